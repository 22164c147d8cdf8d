from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dirmerge import backends, cuda, ops


def truth(base: torch.Tensor, update: torch.Tensor, q: torch.Tensor, K: int, scale: float) -> torch.Tensor:
    q, update = q.double(), update.double()
    return base.double() + scale * K / (K - 1) * (update - torch.outer(q, q @ update) / K)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("shape", [(33, 70), (1, 199), (199, 1), (140, 33)], ids=str)
def test_is_the_sum_rounded_once(shape: tuple[int, int], as_good_as_torch: Callable[..., None]) -> None:
    update, q = torch.randn(shape), torch.randn(shape[0])
    for dtype in backends.FLOATING:
        base = torch.randn(shape).to(dtype)
        for out_dtype in (None, torch.bfloat16, torch.float32):
            arguments = (base, update, q, 7)
            found = cuda.etf_project_add(*arguments, scale=0.75, out_dtype=out_dtype)
            expected = truth(*arguments, 0.75)
            if found.dtype == torch.float64:
                torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
            else:
                by_torch = ops.etf_project_add(*arguments, scale=0.75, out_dtype=out_dtype)
                as_good_as_torch(found, by_torch, expected)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("update_dtype", backends.FLOATING, ids=str)
def test_views_and_other_dtypes_of_the_update(
    update_dtype: torch.dtype, as_good_as_torch: Callable[..., None]
) -> None:
    wide = torch.randn(120, 150)
    for base, update, q in (
        (wide[:100].T.bfloat16(), wide[20:].mT, wide[0]),
        (wide[::2, 5:95].half(), wide[::2, 30:120], wide[1, :120:2]),
        (wide[0].expand(40, 150), wide[:1].expand(40, 150), wide[:40, 3]),
    ):
        arguments = (base, update.to(update_dtype), q.to(update_dtype), 3)
        as_good_as_torch(
            cuda.etf_project_add(*arguments), ops.etf_project_add(*arguments), truth(*arguments, 1.0)
        )


@pytest.mark.usefixtures("emulated")
def test_many_rows(as_good_as_torch: Callable[..., None]) -> None:
    arguments = (torch.randn(4099, 9), torch.randn(4099, 9), torch.randn(4099), 4099)
    as_good_as_torch(
        cuda.etf_project_add(*arguments), ops.etf_project_add(*arguments), truth(*arguments, 1.0)
    )


@pytest.mark.usefixtures("emulated")
def test_what_is_not_finite_stays_where_torch_leaves_it() -> None:
    base, update, q = torch.randn(40, 30), torch.randn(40, 30), torch.randn(40)
    base[3, 4], update[5, 6], update[7, 8] = float("nan"), float("nan"), float("inf")
    found, expected = (f(base, update, q, 5) for f in (cuda.etf_project_add, ops.etf_project_add))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.usefixtures("emulated")
def test_what_is_empty_stays_empty() -> None:
    for shape in ((0, 5), (5, 0)):
        x = torch.ones(shape)
        assert cuda.etf_project_add(x, x, x.sum(1), 2).shape == shape
