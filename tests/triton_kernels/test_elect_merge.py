from __future__ import annotations

from typing import Any

import pytest
import torch
from dirmerge.triton_kernels.elect_merge import elect_merge

from dirmerge import backends, ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def by_torch(*args: Any) -> torch.Tensor:
    with backends.backend("torch"):
        return ops.elect_merge(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0, 0.5]])
@pytest.mark.parametrize("filtered", [False, True])
def test_is_the_mean_of_the_elected_side(
    dtype: torch.dtype, weights: list[float] | None, filtered: bool
) -> None:
    x = torch.randn(4, 33, 33).to(dtype)
    thresholds = torch.linspace(0.1, 1.5, 4) if filtered else None
    found = elect_merge(x, thresholds, weights)
    # torch's default is tested entry by entry elsewhere; the sums run in the same order.
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, by_torch(x, thresholds, weights), rtol=rtol, atol=0)


def test_ties_infinity_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, 1, inf, nan, 0.5, -0.0], [-1, 2, -inf, 1, 3, 0]])
    thresholds = torch.tensor([0.5, 3.0])
    found, expected = elect_merge(x, thresholds), by_torch(x, thresholds)
    assert torch.equal(found.isnan(), torch.tensor([False, False, True, True, False, False]))
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert elect_merge(x)[:2].tolist() == [0, 1.5]


def test_views_long_rows_and_empty_ones() -> None:
    x = torch.randn(40, 40, 3).permute(2, 0, 1)
    torch.testing.assert_close(elect_merge(x), by_torch(x), rtol=2e-7, atol=0)
    rows = torch.randn(5, 40, 60)[::2, :, 7:47]
    torch.testing.assert_close(elect_merge(rows), by_torch(rows), rtol=2e-7, atol=0)
    long = torch.randn(2, 3, 700)
    torch.testing.assert_close(elect_merge(long), by_torch(long), rtol=2e-7, atol=0)
    assert elect_merge(torch.empty(3, 0, 5)).shape == (0, 5)
