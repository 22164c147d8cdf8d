"""The emulator itself: what it runs is right, and what is wrong it finds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import CSRC, ORDERS, Emulated, compile_emulated

from dirmerge.backends import cuda

KERNELS = CSRC / "cuda"
BARRIER = re.compile(r"^ *__syncthreads\(\);.*\n", re.MULTILINE)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# gram: an odd number of steps, so that a tile's last stage is the next tile's first.
PROBLEMS: dict[str, Callable[[], torch.Tensor]] = {
    "gram": lambda: cuda.gram(numbers(33, 130)),
    "etf_project": lambda: cuda.etf_project(numbers(40, 70)),
    "kth_largest_magnitude": lambda: cuda.kth_largest_magnitude(numbers(3, 2000), 700),
}
BARRIERS = [
    pytest.param(op, i, id=f"{op}-{i}")
    for op in PROBLEMS
    for i in range(len(BARRIER.findall((KERNELS / f"{op}.cuh").read_text())))
]


def results(library: Emulated, problem: Callable[[], torch.Tensor]) -> list[torch.Tensor | str]:
    """The result of every order, or its error; the blocks of a grid are few, so that they go round."""
    found: list[torch.Tensor | str] = []
    for order in ORDERS:
        library.configure(order, max_blocks=1)
        try:
            found.append(problem())
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("op", "barrier"), BARRIERS)
def test_every_barrier_is_needed_and_its_loss_is_seen(
    op: str, barrier: int, emulated: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = results(emulated, PROBLEMS[op])
    assert isinstance(first, torch.Tensor)
    assert all(isinstance(found, torch.Tensor) and torch.equal(found, first) for found in others)

    broken = tmp_path / "csrc"
    shutil.copytree(CSRC, broken)
    source = broken / "cuda" / f"{op}.cuh"
    text = source.read_text()
    removed = list(BARRIER.finditer(text))[barrier]
    source.write_text(text[: removed.start()] + text[removed.end() :])
    sources = [broken / "cuda" / f"{op}.cu"]
    rest = (emulated.folder / "library.cu.o",)
    library = Emulated(compile_emulated(broken, sources, tmp_path / "build", rest, "-O0"))
    monkeypatch.setattr(cuda, "library", lambda: library.library)
    wrong = results(library, PROBLEMS[op])
    assert any(isinstance(found, str) or not torch.equal(found, first) for found in wrong)


PROBES = """
#include "cuda/launch.h"
using namespace dirmerge::cuda;

__global__ void half_a_barrier_kernel() {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void lost_lane_kernel(int* out) {
    if (threadIdx.x % 32 != 5) out[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, 1, 0);
}

__global__ void warps_kernel(int* out) {
    SIMT_DYNAMIC_SHARED(int, shared);
    const int lane = threadIdx.x % 32;
    shared[threadIdx.x] = lane;
    __syncthreads();
    int sum = shared[blockDim.x - 1 - threadIdx.x];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, bits);
    const int up = __shfl_up_sync(0xFFFFFFFFu, lane, 3);
    const int down = __shfl_down_sync(0xFFFFFFFFu, lane, 3, 8);
    const unsigned odd = __ballot_sync(0xFFFFFFFFu, lane % 2);
    int half = 0;  // half a warp by itself
    if (lane < 16) half = __shfl_sync(0x0000FFFFu, lane, 15);
    out[4 * threadIdx.x] = sum;
    out[4 * threadIdx.x + 1] = up + 100 * down;
    out[4 * threadIdx.x + 2] = odd == 0xAAAAAAAAu && __any_sync(0xFFFFFFFFu, lane == 7);
    out[4 * threadIdx.x + 3] = half + __syncthreads_count(threadIdx.x < 10);
}

DIRMERGE_EXPORT int dirmerge_half_a_barrier(void* stream) {
    return launch(half_a_barrier_kernel, 1, 64, 0, stream);
}
DIRMERGE_EXPORT int dirmerge_lost_lane(void* out, void* stream) {
    return launch(lost_lane_kernel, 1, 64, 0, stream, static_cast<int*>(out));
}
DIRMERGE_EXPORT int dirmerge_warps(void* out, void* stream) {
    return launch(warps_kernel, 1, 64, 64 * sizeof(int), stream, static_cast<int*>(out));
}
DIRMERGE_EXPORT int dirmerge_too_large(void* stream) {
    return launch(half_a_barrier_kernel, 1, 2048, 0, stream);
}
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("probes")
    source = folder / "probes.cu"
    source.write_text(PROBES)
    return Emulated(compile_emulated(CSRC, [source, KERNELS / "library.cu"], folder))


CPU = torch.device("cpu")


@pytest.mark.parametrize("order", ORDERS)
def test_warp_level_operations(probes: Emulated, order: int) -> None:
    probes.configure(order)
    out = torch.empty(64, 4, dtype=torch.int32)
    probes.library.call("warps", CPU, out)
    lanes = torch.arange(64) % 32
    assert (out[:, 0] == 31 * 16).all()
    up = torch.where(lanes < 3, lanes, lanes - 3)
    down = torch.where(lanes % 8 + 3 < 8, lanes + 3, lanes)
    assert torch.equal(out[:, 1].long(), up + 100 * down)
    assert (out[:, 2] == 1).all()
    assert torch.equal(out[:, 3].long(), torch.where(lanes < 16, 15, 0) + 10)


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_at_which_not_all_arrive_are_errors(probes: Emulated, order: int) -> None:
    probes.configure(order)
    with pytest.raises(RuntimeError, match=r"half_a_barrier: .*divergent barrier: thread .* probes.cu:7"):
        probes.library.call("half_a_barrier", CPU)
    with pytest.raises(RuntimeError, match=r"lost_lane: .*deadlock: .* for lanes that do not come"):
        probes.library.call("lost_lane", CPU, torch.empty(64, dtype=torch.int32))
    # And the next launch runs as if nothing had happened.
    test_warp_level_operations(probes, order)


def test_a_launch_that_no_gpu_takes_is_an_error(probes: Emulated) -> None:
    with pytest.raises(RuntimeError, match="no GPU can launch"):
        probes.library.call("too_large", CPU)
