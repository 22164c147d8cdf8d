from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops

OP = "delta"
SHAPES = [(33, 70), (1, 199), (199, 1), (5000,), (0, 7), (), (2, 3, 5)]


def pair(
    shape: tuple[int, ...], dtype: torch.dtype, base_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.randn(shape, dtype=torch.float64)
    return (base + 0.1 * torch.randn(shape, dtype=torch.float64)).to(dtype), base.to(base_dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("base_dtype", backends.FLOATING, ids=str)
def test_value_is_the_difference_rounded_once(
    dtype_of_backend: torch.dtype, base_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    finetuned, base = pair(shape, dtype_of_backend, base_dtype)
    result = ops.delta(finetuned, base)
    exact = finetuned.double() - base.double()
    is_double = torch.float64 in (dtype_of_backend, base_dtype)
    assert result.value.dtype == (torch.float64 if is_double else torch.float32)
    assert torch.equal(result.value, exact.to(result.value.dtype))
    truth = result.value.double().square().sum()
    torch.testing.assert_close(result.sum_of_squares, truth, rtol=1e-13, atol=0)
    assert result.nonfinite.item() == 0
    assert result.nonfinite.dtype == torch.int64


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    finetuned, base = pair((70, 33), dtype_of_backend, dtype_of_backend)
    expected = ops.delta(finetuned.contiguous(), base)
    assert torch.equal(ops.delta(finetuned.T, base.T).value, expected.value.T)
    sliced = ops.delta(finetuned[::2, 3:20], base[::2, 3:20])
    assert torch.equal(sliced.value, expected.value[::2, 3:20])
    assert sliced.value.is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_entries_are_counted(dtype_of_backend: torch.dtype, bad: float) -> None:
    finetuned, base = pair((50, 199), dtype_of_backend, dtype_of_backend)
    finetuned[0, 0] = bad
    finetuned[49, 198] = bad
    base[20, 20] = bad
    result = ops.delta(finetuned, base)
    assert result.nonfinite.item() == 3
    assert not result.sum_of_squares.isfinite()
    assert torch.equal(result.value.isfinite(), finetuned.isfinite() & base.isfinite())


def test_equal_infinities_have_no_difference(dtype_of_backend: torch.dtype) -> None:
    weight = torch.full((3, 3), float("inf"), dtype=dtype_of_backend)
    assert ops.delta(weight, weight).nonfinite.item() == 9


def test_squares_do_not_overflow_in_float32(dtype_of_backend: torch.dtype) -> None:
    huge = torch.full((40, 40), 6e4 if dtype_of_backend == torch.float16 else 1e30, dtype=dtype_of_backend)
    result = ops.delta(huge, torch.zeros_like(huge))
    truth = huge.double().square().sum()
    torch.testing.assert_close(result.sum_of_squares, truth, rtol=1e-13, atol=0)
    assert result.nonfinite.item() == 0


def test_finite_doubles_whose_squares_overflow_are_not_called_nonfinite(each_backend: str) -> None:
    result = ops.delta(torch.full((5,), 1e200, dtype=torch.float64), torch.zeros(5))
    assert result.nonfinite.item() == 0
    assert result.sum_of_squares.isinf()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_widened_exactly(each_backend: str, dtype: torch.dtype) -> None:
    # Every bit pattern: normal, subnormal, both zeros, infinities and NaNs.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    result = ops.delta(every, torch.zeros_like(every))
    torch.testing.assert_close(result.value, every.float(), rtol=0, atol=0, equal_nan=True)
    assert result.nonfinite.item() == every.isfinite().logical_not().sum()


def test_native_sum_does_not_depend_on_the_threads() -> None:
    if isinstance(backends.native_build_info(), str):
        pytest.skip("the native library is not built")
    finetuned, base = torch.randn(2, 1500, 1000)
    threads = torch.get_num_threads()
    sums = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with backends.backend("native"):
                sums.append(ops.delta(finetuned, base).sum_of_squares.item())
    finally:
        torch.set_num_threads(threads)
    assert sums[0] == sums[1] == sums[2]


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(3, 2\)"):
        ops.delta(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"base must have dtype .* got int8"):
        ops.delta(torch.zeros(2), torch.zeros(2, dtype=torch.int8))
    with pytest.raises(TypeError, match=r"finetuned must be a torch.Tensor, got list"):
        ops.delta([1.0], torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base must be on cpu like the others, got meta"):
        ops.delta(torch.zeros(2), torch.zeros(2, device="meta"))


def test_counts_and_sums_cover_every_piece(dtype_of_backend: torch.dtype) -> None:
    # More entries than any implementation treats at a time; the bad ones lie in the first and the last piece.
    finetuned, base = pair((401, 399), dtype_of_backend, dtype_of_backend)
    finetuned[0, 0] = finetuned[400, 398] = float("nan")
    assert ops.delta(finetuned, base).nonfinite.item() == 2
    finetuned[0, 0] = finetuned[400, 398] = 0
    result = ops.delta(finetuned, base)
    truth = result.value.double().square().sum()
    torch.testing.assert_close(result.sum_of_squares, truth, rtol=1e-12, atol=0)
