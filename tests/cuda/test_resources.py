"""What nvcc and NVRTC say of the kernels: the promises at the head of benchmarks/cuda_kernels.py."""

from __future__ import annotations

import os

import pytest

from benchmarks import cuda_kernels

MISSING = cuda_kernels.nvcc_missing()
pytestmark = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("DIRMERGE_CUDA") != "require", reason=MISSING or "nvcc is there"
)


# make kernels compiles for all; here nvcc's seconds are spent on one.
ARCHITECTURES = [
    pytest.param(arch, marks=[] if arch == "sm_90" else pytest.mark.slow)
    for arch in cuda_kernels.MULTIPROCESSORS
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", cuda_kernels.OPS)
def test_nothing_spills_and_the_designed_blocks_fit(op: str, arch: str) -> None:
    rows = cuda_kernels.compile_op(op, arch)
    assert not [line for row in rows for line in cuda_kernels.broken_promises(row)]
    # The same kernels, under the same names, by NVRTC from the .cuh alone.
    for target in cuda_kernels.MULTIPROCESSORS if arch == "sm_90" else (arch,):
        names = cuda_kernels.compile_nvrtc(op, target, tuple(row.kernel for row in rows))
        assert names == {row.kernel: row.symbol for row in rows}


def test_a_kernel_that_spills_or_does_not_fit_is_found() -> None:
    row = cuda_kernels.Row("op", "kernel", "sm_80", 255, 16, 32, 0, 512, 2, 0, 0.0, "kernel")
    assert len(cuda_kernels.broken_promises(row)) == 2


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 64, 0, 4),
        (256, 65, 0, 3),
        (1024, 32, 0, 2),
        (32, 16, 0, 32),
        (128, 32, 33792, 4),
        (64, 8, 164 << 10, 0),
    ],
)
def test_occupancy_is_nvidias(threads: int, registers: int, shared: int, blocks: int) -> None:
    # By hand from the table of compute capability 8.0.
    sm = cuda_kernels.MULTIPROCESSORS["sm_80"]
    assert cuda_kernels._blocks(sm, threads, registers, shared) == blocks
