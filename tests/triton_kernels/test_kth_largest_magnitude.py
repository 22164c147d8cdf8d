from __future__ import annotations

import pytest
import torch
from dirmerge.triton_kernels.kth_largest_magnitude import kth_largest_magnitude

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def truth(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.abs().flatten(1).sort(dim=1, descending=True).values[:, k - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 2310])
def test_is_the_sorted_one(dtype: torch.dtype, k: int) -> None:
    x = torch.randn(2, 33, 70).to(dtype)
    assert torch.equal(kth_largest_magnitude(x, k), truth(x, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_numbers_are_told_apart(dtype: torch.dtype) -> None:
    # Consecutive bit patterns differ in the last digit only.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    one = int(torch.ones(1, dtype=dtype).view(integer))
    x = torch.arange(one, one + 100).to(integer).view(dtype).view(1, 100)
    x[:, ::3] *= -1
    for k in (1, 50, 100):
        assert torch.equal(kth_largest_magnitude(x, k), truth(x, k))


def test_ties_zeros_infinity_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0, 1, -1, 1, 2, -inf, nan, 1e-45, -3e38]])
    found = [float(kth_largest_magnitude(x, k)) for k in range(1, 11)]
    tiny = float(torch.tensor(1e-45))
    assert found[0] != found[0]
    assert found[1:] == [inf, float(torch.tensor(3e38)), 2, 1, 1, 1, tiny, 0, 0]


def test_many_programs_add_up_their_counts() -> None:
    # More than two blocks of 2048 entries, with an incomplete last one.
    x = torch.randn(2, 6007)
    assert torch.equal(kth_largest_magnitude(x, 6), truth(x, 6))


def test_views_and_no_tasks() -> None:
    x = torch.randn(40, 33, 4).permute(2, 0, 1)
    assert torch.equal(kth_largest_magnitude(x, 9), truth(x, 9))
    assert torch.equal(kth_largest_magnitude(x[::2, :, ::3], 9), truth(x[::2, :, ::3], 9))
    rows = torch.randn(6, 50)[::2]
    assert torch.equal(kth_largest_magnitude(rows, 9), truth(rows, 9))
    assert kth_largest_magnitude(torch.empty(0, 3), 1).shape == (0,)
