from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.etf_project_add import etf_project_add

from dirmerge import ops


def truth(base: torch.Tensor, update: torch.Tensor, q: torch.Tensor, K: int, scale: float) -> torch.Tensor:
    q, update = q.double(), update.double()
    return base.double() + scale * K / (K - 1) * (update - torch.outer(q, q @ update) / K)


@pytest.mark.parametrize("shape", [(33, 70), (70, 33), (1, 199), (199, 1), (600, 140)], ids=str)
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_sum(
    shape: tuple[int, int],
    update_dtype: torch.dtype,
    dtype: torch.dtype,
    as_good_as_torch: Callable[..., None],
) -> None:
    base, update = torch.randn(shape).to(dtype), torch.randn(shape).to(update_dtype)
    q = torch.randn(shape[0]) * (5 / shape[0]) ** 0.5
    found = etf_project_add(base, update, q, 5, scale=0.3)
    expected = ops.etf_project_add(base, update, q, 5, scale=0.3)
    as_good_as_torch(found, expected, truth(base, update, q, 5, 0.3))


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_sum_is_rounded_once_to_nearest_even(out: torch.dtype) -> None:
    # With q = 0 and K = 2: 1 + i/2¹² around the ties of bfloat16 (2⁻⁸) and of float16 (2⁻¹¹).
    update = torch.arange(-96.0, 96.0).reshape(16, 12) / 8192
    exact = 1 + 2 * update.double()
    found = etf_project_add(torch.ones(16, 12), update, torch.zeros(16), 2, out_dtype=out)
    assert torch.equal(found, exact.to(out))


def test_every_slice_of_rows_counts() -> None:
    # Only one row of D differs from 0 at a time, in the first and in the last slice.
    for row in (0, 32, 1023, 1024, 1029):
        update, q = torch.zeros(1030, 3), torch.randn(1030)
        update[row] = 1
        found = etf_project_add(torch.zeros(1030, 3), update, q, 4)
        expected = truth(torch.zeros(1030, 3), update, q, 4, 1.0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_views_mixed_dtypes_and_empty_inputs(as_good_as_torch: Callable[..., None]) -> None:
    base, update = torch.randn(70, 33).T.half(), torch.randn(66, 140)[::2, ::2].double()
    q = torch.randn(33, 2, dtype=torch.float64)[:, 0]
    found, expected = etf_project_add(base, update, q, 33), ops.etf_project_add(base, update, q, 33)
    as_good_as_torch(found, expected, truth(base, update, q, 33, 1.0))
    for shape in ((0, 3), (3, 0)):
        assert (
            etf_project_add(torch.empty(shape), torch.empty(shape), torch.empty(shape[0]), 2).shape == shape
        )
