from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirmerge import backends, ops

OP = "kth_largest_magnitude"


def truth(x: torch.Tensor, k: int) -> torch.Tensor:
    return x.abs().flatten(1).sort(dim=1, descending=True).values[:, k - 1]


@pytest.mark.parametrize("shape", [(3, 33, 70), (1, 1, 199), (2, 199, 1), (4, 1), (8, 5000)], ids=str)
def test_is_the_kth_of_the_sorted_magnitudes(dtype_of_backend: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype_of_backend)
    size = x[0].numel()
    for k in {1, max(1, size // 1000), max(1, size // 5), max(1, size // 2), size}:
        assert torch.equal(ops.kth_largest_magnitude(x, k), truth(x, k)), k


def test_many_slices_agree_on_one_number(each_backend: str) -> None:
    # Rows long enough for several threads, and small k so that groups are skipped.
    x = torch.randn(2, 1100, 1000)
    x[1] *= torch.linspace(1e-3, 1, 1100)[:, None]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for k in (1, 1100, 300_000):
            assert torch.equal(ops.kth_largest_magnitude(x, k), truth(x, k)), k
    finally:
        torch.set_num_threads(threads)


def test_ties_count_one_by_one(dtype_of_backend: torch.dtype) -> None:
    x = torch.tensor([[1.0, -2, 2, 2, -3, 0, 0, 1]], dtype=dtype_of_backend)
    found = [ops.kth_largest_magnitude(x, k).item() for k in range(1, 9)]
    assert found == [3, 2, 2, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5])
def test_one_repeated_number(dtype_of_backend: torch.dtype, value: float) -> None:
    x = torch.full((2, 70, 33), value, dtype=dtype_of_backend)
    for k in (1, 1000, 2310):
        assert torch.equal(ops.kth_largest_magnitude(x, k), torch.full((2,), value, dtype=dtype_of_backend))


def test_huge_and_tiny_numbers(dtype_of_backend: torch.dtype) -> None:
    limits = torch.finfo(dtype_of_backend)
    x = torch.tensor([[limits.max, -limits.smallest_normal, limits.tiny / 4, -float("inf"), 0, 1]])
    x = x.to(dtype_of_backend)
    for k in range(1, 7):
        assert torch.equal(ops.kth_largest_magnitude(x, k), truth(x, k)), k


def test_nan_ranks_above_infinity(dtype_of_backend: torch.dtype) -> None:
    x = torch.tensor([[1.0, float("nan"), float("inf"), -float("nan"), -5]], dtype=dtype_of_backend)
    found = torch.cat([ops.kth_largest_magnitude(x, k) for k in range(1, 6)])
    assert found[:2].isnan().all()
    assert found[2:].tolist() == [float("inf"), 5, 1]


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(70, 33, 4, dtype=torch.float64).to(dtype_of_backend).permute(2, 0, 1)[1:, ::2, 5:]
    assert torch.equal(ops.kth_largest_magnitude(x, 100), truth(x, 100))


def test_no_tasks_have_no_thresholds(each_backend: str) -> None:
    assert torch.equal(ops.kth_largest_magnitude(torch.zeros(0, 3, 3), 1), torch.zeros(0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_floats_in_any_order(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60))
    k = data.draw(st.integers(1, len(values)))
    expected = np.sort(np.abs(np.array(values, dtype=np.float32)))[::-1][k - 1]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([values], dtype=dtype)
        for name in ("torch", "native"):
            if name == "native" and isinstance(backends.native_build_info(), str):
                continue
            with backends.backend(name):
                assert ops.kth_largest_magnitude(x, k).item() == expected


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 3, 4)
    for k in (0, 13, -1):
        with pytest.raises(ValueError, match=f"k must be from 1 to 12, .* got {k}"):
            ops.kth_largest_magnitude(x, k)
    with pytest.raises(ValueError, match=r"shape \(T, ...\), got \(3,\)"):
        ops.kth_largest_magnitude(torch.zeros(3), 1)
    with pytest.raises(TypeError, match="got int64"):
        ops.kth_largest_magnitude(torch.zeros(2, 3, dtype=torch.int64), 1)
