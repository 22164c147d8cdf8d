"""One form of every kernel with matrix products; `python -m benchmarks.kernels` checks all forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dirmerge.triton_kernels import gram

from benchmarks import kernels

TESTED = {
    ("gram", "bfloat16"),
    ("lowrank_add", "bfloat16"),
    ("lowrank_add", "bfloat16, float32 factors"),
    ("delta_sketch", "bfloat16, random"),
    ("delta_sketch", "bfloat16, given"),
    ("polar_step", "bfloat16"),
    ("kth_largest_magnitude", "bfloat16"),
    ("elect_merge", "bfloat16"),
    ("etf_project", "bfloat16, K = 128"),
}
FORMS = [
    pytest.param(form, id=f"{form.op}: {form.name}")
    for form in kernels.FORMS
    if (form.op, form.name) in TESTED
]


def test_every_kernel_is_in_the_table() -> None:
    assert {(form.op, form.name) for form in kernels.FORMS} >= TESTED
    folder = Path(gram.__file__).parent
    assert {form.op for form in kernels.FORMS} == {
        path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")
    }


@pytest.mark.parametrize("target", kernels.TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_spills_and_matrix_units_are_used(form: kernels.Form, target: str) -> None:
    assert not kernels.broken_promises(form, target, kernels.measure(form, target))


def test_a_kernel_that_spills_is_found() -> None:
    # The sums of a tile of 128 x 128 do not fit the registers of one warp.
    def launch(size: int) -> None:
        x = kernels.normal(size, size, dtype=torch.float16)
        options = {"BLOCK_N": 128, "BLOCK_M": 16, "PRECISION": "ieee", "INTERPRETED": False}
        gram.gram_kernel[(1,)](x, x, size, size, 10, 0, size, 1, num_warps=1, **options)

    # Of float32 operands a TF32 instruction is expected, which there is not either.
    form = kernels.Form("gram", "one warp", lambda size: ((), {}), {"gram_kernel": False})
    broken = kernels.broken_promises(form, "sm_80", kernels.measure(form, "sm_80", launch))
    assert any("bytes of stack" in line for line in broken)
    assert any("tf32" in line for line in broken)


def test_an_error_above_twice_torchs_own_is_found() -> None:
    good, bad = kernels.Accuracy(2e-7, 1e-7, 0.0), kernels.Accuracy(3e-7, 1e-7, 6e-8)
    nan = kernels.Accuracy(float("nan"), 1e-7, 6e-8)
    numbers = {("gram", "good"): good, ("gram", "bad"): bad, ("gram", "nan"): nan}
    assert [line.split(")")[0] for line in kernels.wrong_numbers(numbers, "Triton")] == [
        "gram (bad",
        "gram (nan",
    ]


def test_occupancy_counts_the_scarcest() -> None:
    # 8 warps of 128 registers: two blocks of 32768 registers; 100 kB of shared memory: one block of two;
    # small blocks of 4 warps: 16 blocks of 64 warps.
    assert kernels.occupancy(128, 8, 0, "sm_80") == 16 / 64
    assert kernels.occupancy(32, 8, 100_000, "sm_80") == 8 / 64
    assert kernels.occupancy(32, 8, 100_000, "sm_90") == 16 / 64
    assert kernels.occupancy(32, 4, 0, "sm_90") == 1
    assert kernels.occupancy(32, 4, 0, "gfx942") is None
