from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops
from dirmerge.backends import cuda


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether both are equal to the bit, NaN where NaN is; the sign of a zero does not count."""
    return found.dtype == expected.dtype and bool(
        ((found == expected) | (found.isnan() & expected.isnan())).all()
    )


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("shape", [(8, 33, 70), (1, 5, 5), (2, 1, 199), (3, 64, 64), (5, 2100)], ids=str)
def test_is_torchs_result_to_the_bit(shape: tuple[int, ...]) -> None:
    T = shape[0]
    for dtype in backends.FLOATING:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        for thresholds in (None, torch.linspace(0.1, 1.5, T).to(dtype)):
            for weights in (None, [0.3 + t for t in range(T)]):
                found = cuda.elect_merge(x, thresholds, weights)
                assert found.is_contiguous()
                assert torch.equal(found, ops.elect_merge(x, thresholds, weights))


@pytest.mark.usefixtures("each_order")
def test_views_are_read_by_their_strides() -> None:
    x = torch.randn(40, 40, 5).permute(2, 0, 1)
    assert torch.equal(cuda.elect_merge(x), ops.elect_merge(x))
    assert torch.equal(cuda.elect_merge(x[::2]), ops.elect_merge(x[::2]))
    rows = torch.randn(5, 40, 60)[::2, :, 7:47]
    for view in (rows, rows.mT, rows[:1].expand(3, 40, 40)):
        assert torch.equal(cuda.elect_merge(view), ops.elect_merge(view))


@pytest.mark.usefixtures("emulated")
def test_special_numbers_are_treated_as_in_torch() -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, 1, -1, 2, inf, -inf, nan])
    pairs = torch.cartesian_prod(values, values, values).T
    for dtype in backends.FLOATING:
        x = pairs.to(dtype).contiguous()
        for thresholds in (None, torch.tensor([1.0, nan, 1.5]), torch.tensor([0.0, -1.0, inf])):
            for weights in (None, [1.0, 0.0, 2.0], [0.0, 0.0, 0.0]):
                found = cuda.elect_merge(x, thresholds, weights)
                assert agree(found, ops.elect_merge(x, thresholds, weights)), (dtype, thresholds, weights)


@pytest.mark.usefixtures("emulated")
def test_an_entry_equal_to_its_threshold_is_kept_and_ties_cancel() -> None:
    for dtype in backends.FLOATING:
        x = torch.tensor([[0.5, -0.5, 0.25, 4, 3], [2, 2, 0.25, 1, -3]], dtype=dtype)
        assert cuda.elect_merge(x, torch.tensor([0.5, 2.0])).tolist() == [1.25, 2, 0, 4, 0]


@pytest.mark.usefixtures("emulated")
def test_huge_and_tiny_numbers() -> None:
    for dtype in backends.FLOATING:
        limits = torch.finfo(dtype)
        x = torch.randn(3, 64).clamp(-1, 1).to(dtype)
        for scale in (limits.max / 4, limits.tiny):
            assert agree(cuda.elect_merge(x * scale), ops.elect_merge(x * scale))


@pytest.mark.usefixtures("emulated")
def test_what_is_empty_stays_empty() -> None:
    assert cuda.elect_merge(torch.empty(2, 0, 3)).shape == (0, 3)
