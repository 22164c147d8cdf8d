from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.delta_sketch import delta_sketch

from dirmerge.ops.delta_sketch import DeltaSketch, random_signs
from dirmerge.ops.delta_sketch import delta_sketch as delta_sketch_op


def weights(m: int, n: int, dtype: torch.dtype, T: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = torch.randn(m, n)
    return base.to(dtype), [(base + 0.1 * torch.randn(m, n)).to(dtype) for _ in range(T)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("given", [None, 2, 3])
def test_is_the_product_with_the_difference(
    transposed: bool,
    given: int | None,
    dtype: torch.dtype,
    as_good_as_torch: Callable[..., None],
) -> None:
    base, finetuned = weights(33, 70, dtype)
    rows = 33 if transposed else 70
    seed = 2**40 + 5
    test = None if given is None else torch.randn(*((2,) if given == 3 else ()), rows, 20)
    width = 150 if test is None else 20
    options = {"width": width, "seed": seed, "transposed": transposed}
    value, total, nonfinite = delta_sketch(base, finetuned, test, **options)
    expected = delta_sketch_op(
        base, finetuned, test=test, width=None if given else width, seed=seed, transposed=transposed
    )
    differences = torch.stack(finetuned).double() - base.double()
    factor = random_signs(rows, width, seed) if test is None else test
    truth = (differences.mT if transposed else differences) @ factor.double()
    as_good_as_torch(value, expected.value, truth)
    torch.testing.assert_close(total, differences.square().sum((1, 2)), rtol=1e-6, atol=0)
    assert nonfinite.tolist() == [0, 0]
    assert nonfinite.dtype == torch.int64


def test_what_is_not_finite_is_counted_per_task() -> None:
    base, finetuned = weights(70, 33, torch.float32, T=3)
    finetuned[0][3, 4] = float("nan")
    finetuned[0][69, 32] = float("inf")
    finetuned[2][0, 0] = -float("inf")
    _, total, nonfinite = delta_sketch(base, finetuned, None, width=70, seed=0)
    assert nonfinite.tolist() == [2, 0, 1]
    assert total.isfinite().tolist() == [False, True, False]


def test_the_square_of_a_large_difference_is_finite() -> None:
    base, huge = torch.zeros(3, 5), torch.full((3, 5), 1e30)
    found = DeltaSketch(*delta_sketch(base, [huge], None, width=2, seed=0))
    torch.testing.assert_close(
        found.sum_of_squares, torch.tensor([15e60], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert found.nonfinite.tolist() == [0]


def test_mixed_dtypes_views_and_empty_inputs(as_good_as_torch: Callable[..., None]) -> None:
    base = torch.randn(70, 33).T.bfloat16()
    finetuned = [base.float() + 0.1 * torch.randn(33, 70), (base.float() + 0.1).T.contiguous().T]
    truth = torch.stack([w.double() - base.double() for w in finetuned]) @ random_signs(70, 5, 1).double()
    expected = delta_sketch_op(base, finetuned, width=5, seed=1).value
    as_good_as_torch(delta_sketch(base, finetuned, None, width=5, seed=1)[0], expected, truth)
    assert delta_sketch(base, [], None, width=5)[0].shape == (0, 33, 5)
    value, total, _ = delta_sketch(torch.empty(4, 0), [torch.empty(4, 0)], None, width=2)
    assert torch.equal(value, torch.zeros(1, 4, 2))
    assert total.tolist() == [0]
