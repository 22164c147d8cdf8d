"""One form of every kernel with matrix products; `python -m benchmarks.kernels` checks all forms."""

from __future__ import annotations

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
    ("delta_sketch", "bfloat16, given, IEEE"),
    ("polar_step", "bfloat16"),
    ("kth_largest_magnitude", "bfloat16"),
    ("elect_merge", "bfloat16"),
    ("etf_project", "bfloat16, K = 128"),
    ("etf_project_add", "bfloat16, float32 update"),
}
FORMS = [
    pytest.param(form, id=f"{form.op}: {form.name}")
    for form in kernels.FORMS
    if (form.op, form.name) in TESTED
]


def test_every_kernel_is_in_the_table() -> None:
    assert {(form.op, form.name) for form in kernels.FORMS} >= TESTED
    folder = kernels.Path(gram.__file__).parent
    assert {form.op for form in kernels.FORMS} == {
        path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")
    }


@pytest.mark.parametrize("target", kernels.TARGETS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_spills_and_matrix_units_are_used(form: kernels.Form, target: str) -> None:
    assert not kernels.broken_promises(form, target, kernels.measure(form, target))


def test_a_kernel_that_spills_is_found() -> None:
    # The sums of a tile of 128 x 128 do not fit the registers of one warp.
    def launch() -> None:
        x = kernels.zeros(512, 512, dtype=torch.float16)
        options = {"BLOCK_N": 128, "BLOCK_M": 16, "PRECISION": "ieee", "INTERPRETED": False}
        gram.gram_kernel[(1,)](x, x, 512, 512, 10, 0, 512, 1, num_warps=1, **options)

    form = kernels.Form("gram", "one warp", launch, {"gram_kernel": True})
    broken = kernels.broken_promises(form, "sm_80", kernels.measure(form, "sm_80"))
    assert any("bytes of stack" in line for line in broken)
    assert any("bf16" in line for line in broken)
