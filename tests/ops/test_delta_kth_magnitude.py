from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops

OP = "delta_kth_magnitude"
MIXED = [torch.float16, torch.float32, torch.bfloat16]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, T: int, *, is_mixed: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = torch.randn(shape, dtype=torch.float64)
    weights = [
        (base + 0.1 * torch.randn(shape, dtype=torch.float64)).to(MIXED[t % 3] if is_mixed else dtype)
        for t in range(T)
    ]
    return base.to(dtype), weights


def sorted_magnitudes(
    base: torch.Tensor | None, weights: list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    origin = 0 if base is None else base.to(dtype)
    return torch.stack([(w.to(dtype) - origin).abs().flatten().sort(descending=True).values for w in weights])


@pytest.mark.parametrize("shape", [(33, 70), (1, 199), (199, 1), (5000,), (), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["same", "mixed"])
def test_thresholds_are_the_sorted_magnitudes(
    dtype_of_backend: torch.dtype, shape: tuple[int, ...], T: int, is_mixed: bool
) -> None:
    base, weights = problem(shape, dtype_of_backend, T, is_mixed=is_mixed)
    dtype = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    for origin in (base, None):
        compute = dtype if origin is not None or not is_mixed else torch.float32
        expected = sorted_magnitudes(origin, weights, compute)
        size = expected.shape[1]
        for k in {1, max(1, size // 5), size}:
            result = ops.delta_kth_magnitude(origin, weights, k)
            assert result.thresholds.dtype == compute
            assert torch.equal(result.thresholds, expected[:, k - 1])
            assert result.nonfinite.item() == 0
            assert result.nonfinite.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 37, 80_000, 159_999])
def test_many_pieces_and_repeated_values(dtype_of_backend: torch.dtype, k: int) -> None:
    base, weights = problem((401, 399), dtype_of_backend, 2)
    weights[1] = (base.double() + torch.randint(-2, 3, base.shape)).to(dtype_of_backend)
    compute = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    differences = torch.stack([weight.to(compute) - base.to(compute) for weight in weights])
    result = ops.delta_kth_magnitude(base, weights, k)
    assert torch.equal(result.thresholds, sorted_magnitudes(base, weights, compute)[:, k - 1])
    assert torch.equal(result.thresholds, ops.kth_largest_magnitude(differences, k))


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    base, weights = problem((70, 33), dtype_of_backend, 2)
    expected = ops.delta_kth_magnitude(
        base[::2, 3:20].contiguous(), [w[::2, 3:20].contiguous() for w in weights], 60
    )
    strided = ops.delta_kth_magnitude(base[::2, 3:20], [w[::2, 3:20] for w in weights], 60)
    assert torch.equal(strided.thresholds, expected.thresholds)


def test_equal_weights_have_threshold_zero(dtype_of_backend: torch.dtype) -> None:
    base, _ = problem((33, 70), dtype_of_backend, 1)
    assert torch.equal(
        ops.delta_kth_magnitude(base, [base], 5).thresholds.double(), torch.zeros(1, dtype=torch.float64)
    )


@pytest.mark.parametrize("k", [1, 2, 3, 4, 159_999])
def test_nan_ranks_above_infinity_and_both_are_counted(dtype_of_backend: torch.dtype, k: int) -> None:
    base, weights = problem((401, 399), dtype_of_backend, 2)
    weights[0][0, 0] = float("nan")
    weights[0][400, 398] = float("inf")
    weights[0][200, 7] = -float("inf")
    weights[1][5, 5] = float("nan")
    result = ops.delta_kth_magnitude(base, weights, k)
    assert result.nonfinite.item() == 4
    assert result.thresholds[0].isnan().item() is (k == 1)
    assert result.thresholds[0].isinf().item() is (k in (2, 3))
    assert result.thresholds[1].isnan().item() is (k == 1)
    assert result.thresholds[1].isfinite().item() is (k > 1)


def test_a_difference_that_overflows_is_counted(each_backend: str) -> None:
    huge = torch.full((3,), 3e38)
    result = ops.delta_kth_magnitude(-huge, [huge, -huge], 1)
    assert result.nonfinite.item() == 3
    assert result.thresholds.tolist() == [float("inf"), 0.0]


def test_native_result_does_not_depend_on_the_threads() -> None:
    if isinstance(backends.native_build_info(), str):
        pytest.skip("the native library is not built")
    base, weights = problem((1501, 999), torch.bfloat16, 2)
    weights[1][700, 3] = float("inf")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with backends.backend("native"):
                result = ops.delta_kth_magnitude(base, weights, 300_000)
            expected = sorted_magnitudes(base, weights, torch.float32)[:, 299_999]
            assert torch.equal(result.thresholds, expected)
            assert result.nonfinite.item() == 1
    finally:
        torch.set_num_threads(threads)


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 3)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k must be from 1 to 6, the size of a weight, got {k}"):
            ops.delta_kth_magnitude(x, [x], k)
    with pytest.raises(ValueError, match="k must be from 1 to 0"):
        ops.delta_kth_magnitude(x[:0], [x[:0]], 1)
    with pytest.raises(ValueError, match=r"weights\[0\] must have the shape of base"):
        ops.delta_kth_magnitude(x, [x.T], 1)
    with pytest.raises(ValueError, match="weights must be T >= 1 tensors, got none"):
        ops.delta_kth_magnitude(x, [], 1)
    with pytest.raises(TypeError, match=r"weights\[0\] must have dtype .* got int8"):
        ops.delta_kth_magnitude(x, [x.to(torch.int8)], 1)
