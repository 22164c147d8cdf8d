"""The CUDA C++ kernels on a GPU: against float64, against torch, on views, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dirmerge import backends, ops
from dirmerge.backends import cuda

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
    pytest.mark.skipif(bool(cuda.missing()), reason=cuda.missing() or "the CUDA library is there"),
]
NARROW = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(33, 70), (2, 199, 33), (3, 130, 129), (1024, 1024), (4099, 40)]


def assert_as_good_as_torch(run: Callable[[], torch.Tensor], truth: torch.Tensor) -> None:
    """The error of the native kernel is at most twice that of torch in the same dtype, on the same device."""
    precise = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        results = {}
        for name in ("native", "torch"):
            with backends.backend(name):
                results[name] = run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = precise
    found, by_torch = results["native"], results["torch"]
    assert found.dtype == by_torch.dtype
    assert found.is_contiguous()
    floor = (1e-14 if found.dtype == torch.float64 else torch.finfo(torch.float32).eps / 8) * truth.norm()
    assert (found.double() - truth).norm() <= 2 * (by_torch.double() - truth).norm() + floor


def views(x: torch.Tensor) -> list[torch.Tensor]:
    return [x, x.mT, x[..., ::2, 1:], x[..., :1, :].expand(x.shape)]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in views(torch.randn(shape, device="cuda").to(dtype)):
        assert_as_good_as_torch(partial(ops.gram, x), x.double().mT @ x.double())


@pytest.mark.parametrize("dtype", backends.FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_etf_project(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for core in views(torch.randn(shape, device="cuda").to(dtype)):
        K = core.shape[-2]
        truth = (core.double() - core.double().mean(-2, keepdim=True)) * (K / (K - 1))
        assert_as_good_as_torch(partial(ops.etf_project, core), truth)


@pytest.mark.parametrize("dtype", backends.FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 70), (1, 1, 199), (2, 1024, 1024), (1100, 3)], ids=str)
def test_kth_largest_magnitude(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    for view in (x, x.transpose(-1, -2) if x.dim() > 2 else x, x[::2]):
        ordered = view.abs().flatten(1).sort(dim=1, descending=True).values
        for k in {1, 1 + ordered.shape[1] // 5, ordered.shape[1]}:
            with backends.backend("native"):
                assert torch.equal(ops.kth_largest_magnitude(view, k), ordered[:, k - 1])


@pytest.mark.parametrize("dtype", backends.FLOATING, ids=str)
@pytest.mark.parametrize("K", [48, 199, 1024])
def test_elect_merge(K: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, K, K, device="cuda").to(dtype)
    thresholds, weights = torch.linspace(0.1, 1, 5, device="cuda"), [0.3, 1.0, 2.0, 0.0, 1.5]
    for view in (x, x.mT, x[:, : K // 2, : K // 2]):
        results = []
        for name in ("native", "torch"):
            with backends.backend(name):
                results.append(ops.elect_merge(view, thresholds, weights))
        assert torch.equal(*results)


def test_special_numbers() -> None:
    values = torch.tensor([0.0, -0.0, 1, -1, 2, float("inf"), -float("inf"), float("nan")], device="cuda")
    x = torch.cartesian_prod(values, values, values).T.contiguous()
    results = []
    for name in ("native", "torch"):
        with backends.backend(name):
            results.append(ops.elect_merge(x, torch.tensor([1.0, float("nan"), 1.5], device="cuda")))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_more_blocks_than_a_grid_has_in_y_and_empty_batches() -> None:
    core = torch.randn(70_000, 2, 3, device="cuda")
    assert_as_good_as_torch(lambda: ops.etf_project(core), (core.double() - core.double().mean(1, True)) * 2)
    assert_as_good_as_torch(lambda: ops.gram(core), core.double().mT @ core.double())
    with backends.backend("native"):
        assert ops.gram(core[:0]).shape == (0, 3, 3)
        assert ops.etf_project(core[:0]).shape == (0, 2, 3)
        assert ops.kth_largest_magnitude(core[:0], 1).shape == (0,)


def test_the_current_stream_is_used_and_nothing_waits() -> None:
    """A graph captures only what goes to its stream, and a capture fails where anything synchronises."""
    x = torch.randn(4, 256, 256, device="cuda")
    result = {}
    graph = torch.cuda.CUDAGraph()
    with backends.backend("native"):
        ops.gram(x)  # loads the kernels
        ops.kth_largest_magnitude(x, 99)
        ops.etf_project(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result["gram"] = ops.gram(x)
            result["kth"] = ops.kth_largest_magnitude(x, 99)
            result["etf"] = ops.etf_project(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    with backends.backend("native"):
        assert torch.equal(result["gram"], ops.gram(x))
        assert torch.equal(result["kth"], ops.kth_largest_magnitude(x, 99))
        assert torch.equal(result["etf"], ops.etf_project(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    x = torch.randn(40, 50, device="cuda:1")
    with torch.cuda.device(0), backends.backend("native"):
        found = ops.gram(x)
    assert found.device == x.device
    torch.testing.assert_close(found, x.mT @ x, rtol=1e-4, atol=1e-4)
