from __future__ import annotations

import pytest
import torch

from dirmerge import backends
from dirmerge.backends import cuda


def truth(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.abs().flatten(1).sort(dim=1, descending=True).values[:, k - 1]


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("shape", [(3, 33, 70), (1, 1, 199), (2, 199, 1), (4, 1), (2, 64, 64)], ids=str)
def test_is_the_kth_of_the_sorted_magnitudes(shape: tuple[int, ...]) -> None:
    for dtype in backends.FLOATING:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        size = x[0].numel()
        for k in {1, max(1, size // 3), size}:
            found = cuda.kth_largest_magnitude(x, k)
            assert found.dtype == dtype
            assert torch.equal(found, truth(x, k)), (dtype, k)


@pytest.mark.usefixtures("emulated")
def test_ties_count_one_by_one() -> None:
    for dtype in backends.FLOATING:
        x = torch.tensor([[1.0, -2, 2, 2, -3, 0, -0.0, 1]], dtype=dtype)
        found = [cuda.kth_largest_magnitude(x, k).item() for k in range(1, 9)]
        assert found == [3, 2, 2, 2, 1, 1, 0, 0]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("value", [0.0, -1.5])
def test_one_repeated_number_fills_one_bin(value: float) -> None:
    for dtype in backends.FLOATING:
        x = torch.full((2, 70, 33), value, dtype=dtype)
        for k in (1, 2310):
            expected = torch.full((2,), abs(value), dtype=dtype)
            assert torch.equal(cuda.kth_largest_magnitude(x, k), expected)


@pytest.mark.usefixtures("emulated")
def test_huge_tiny_and_infinite_numbers_and_nan_above_them() -> None:
    for dtype in backends.FLOATING:
        limits = torch.finfo(dtype)
        x = torch.tensor([[limits.max, -limits.smallest_normal, limits.tiny / 4, -float("inf"), 0, 1]])
        x = x.to(dtype)
        for k in range(1, 7):
            assert torch.equal(cuda.kth_largest_magnitude(x, k), truth(x, k)), (dtype, k)
        x = torch.tensor([[1.0, float("nan"), float("inf"), -float("nan"), -5]], dtype=dtype)
        found = torch.cat([cuda.kth_largest_magnitude(x, k) for k in range(1, 6)])
        assert found[:2].isnan().all()
        assert found[2:].tolist() == [float("inf"), 5, 1]


@pytest.mark.usefixtures("each_order")
def test_views_are_read_by_their_strides() -> None:
    base = torch.randn(9, 40, 40)
    for x in (base[::2], base[1:, ::2, 5:], base.permute(2, 0, 1), base[0].expand(3, 40, 40), base[:, 1]):
        assert torch.equal(cuda.kth_largest_magnitude(x, 30), truth(x, 30))


@pytest.mark.usefixtures("emulated")
def test_many_tasks_and_none() -> None:
    x = torch.randn(1100, 3)
    assert torch.equal(cuda.kth_largest_magnitude(x, 2), truth(x, 2))
    assert torch.equal(cuda.kth_largest_magnitude(torch.zeros(0, 3, 3), 1), torch.zeros(0))
