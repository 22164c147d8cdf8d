"""The Triton kernels on a real GPU: sizes the interpreter has no time for, streams, CUDA graphs.

Skipped without a GPU. The tests of tests/triton_kernels run on one too: make test-gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dirmerge import backends, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

QUINTIC = (15 / 8, -10 / 8, 3 / 8)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

Call = Callable[[torch.dtype, int, int], tuple[Any, ...]]


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    with backends.backend("triton"):
        yield
    torch.set_default_device(None)


def _delta_sketch(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    base = torch.randn(m, n)
    finetuned = [(base + 0.1 * torch.randn(m, n)).to(dtype) for _ in range(3)]
    return ops.delta_sketch(base.to(dtype), finetuned, width=n // 8 + 16, seed=5)[:2]


def _polar_step(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    return (ops.polar_step((torch.randn(2, m, n) / (2 * m**0.5)).to(dtype), *QUINTIC),)


def _elect_merge(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    x = torch.randn(4, n, n).to(dtype)
    thresholds = ops.kth_largest_magnitude(x, n * n // 5)
    return thresholds, ops.elect_merge(x, thresholds, [1.0, 2.0, 0.5, 1.0])


def _lowrank_add(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    return (ops.lowrank_add(torch.randn(m, n).to(dtype), torch.randn(m, 128) / 11, torch.randn(n, 128)),)


def _etf(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    return (ops.etf_project(torch.randn(m, n).to(dtype)),)


def _gram(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    return (ops.gram(torch.randn(3, m, n).to(dtype)),)


def _rotation_step(dtype: torch.dtype, m: int, n: int) -> tuple[Any, ...]:
    # A permutation: a factorisation may wait for the GPU.
    rotation = torch.eye(n)[torch.randperm(n)].expand(2, n, n)
    return ops.rotation_step(rotation, torch.randn(2, n, n) / n**0.5, rate=0.1)[:1]


CALLS: dict[str, Call] = {
    "delta_sketch": _delta_sketch,
    "elect_merge": _elect_merge,
    "etf_project": _etf,
    "gram": _gram,
    "lowrank_add": _lowrank_add,
    "polar_step": _polar_step,
    "rotation_step": _rotation_step,
}


@pytest.mark.parametrize("shape", [(1536, 384), (1001, 999), (4096, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_torch_on_real_sizes(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    found = CALLS[name](dtype, *shape)
    torch.manual_seed(0)
    with backends.backend("torch"):
        expected = CALLS[name](dtype, *shape)
    for one, other in zip(found, expected, strict=True):
        assert one.is_cuda
        error = (one.double() - other.double()).norm() / other.double().norm()
        # Both round once, so at worst they differ by one unit where they fall on different sides.
        assert error <= max(1e-5, torch.finfo(one.dtype).eps)


@pytest.mark.parametrize("name", CALLS)
def test_no_launcher_waits_for_the_gpu(name: str) -> None:
    CALLS[name](torch.bfloat16, 256, 128)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[name](torch.bfloat16, 256, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_polar_steps_are_captured_and_replayed_as_a_graph(dtype: torch.dtype) -> None:
    def loop(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = ops.polar_step(x, *QUINTIC)
        return x

    def matrix() -> torch.Tensor:
        return (torch.randn(2, 512, 256) / 40).to(dtype)

    x = matrix()
    # The first call compiles, which no capture allows; on another stream, as torch asks for it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = loop(x)
    for _ in range(3):
        x.copy_(matrix())
        # What is allocated meanwhile must not be the graph's memory.
        noise = [torch.full((2, 512, 256), float("nan")) for _ in range(8)]
        graph.replay()
        assert torch.equal(result, loop(x))
        del noise


def test_the_current_stream_is_used() -> None:
    x = torch.zeros(2048, 512)
    ops.gram(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Long enough that a launch on another stream would read zeros.
        torch.cuda._sleep(100_000_000)
        x.fill_(1)
        found = ops.gram(x)
    stream.synchronize()
    assert torch.equal(found, torch.full((512, 512), 2048.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")
def test_the_tensors_device_is_used() -> None:
    x = torch.ones(64, 32, device="cuda:1")
    assert torch.cuda.current_device() == 0
    found = ops.gram(x)
    assert found.device == x.device
    assert torch.equal(found, torch.full((32, 32), 64.0, device="cuda:1"))
