from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops
from dirmerge.ops.delta_add import round_once

OP = "delta_add"
SHAPES = [(33, 70), (1, 199), (199, 1), (5000,), (0, 7), (), (2, 3, 5)]
MIXED = [torch.float16, torch.float32, torch.bfloat16]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, T: int, *, is_mixed: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    base = torch.randn(shape, dtype=torch.float64)
    weights = [
        (base + 0.1 * torch.randn(shape, dtype=torch.float64)).to(MIXED[t % 3] if is_mixed else dtype)
        for t in range(T)
    ]
    return base.to(dtype), weights, [0.7 / (t + 1) * (-1) ** t for t in range(T)]


def composed(
    base: torch.Tensor | None, weights: list[torch.Tensor], coefficients: list[float], dtype: torch.dtype
) -> torch.Tensor:
    """The formula in the given dtype, in the order of the op, not rounded at the end."""
    origin = torch.zeros_like(weights[0], dtype=dtype) if base is None else base.to(dtype)
    total = torch.zeros_like(origin)
    for weight, coefficient in zip(weights, coefficients, strict=True):
        total = total + (weight.to(dtype) - origin) * coefficient
    return origin + total


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["same", "mixed"])
def test_value_is_the_formula_in_float32_rounded_once(
    dtype_of_backend: torch.dtype, shape: tuple[int, ...], T: int, is_mixed: bool
) -> None:
    base, weights, coefficients = problem(shape, dtype_of_backend, T, is_mixed=is_mixed)
    compute = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    result = ops.delta_add(base, weights, coefficients)
    assert result.value.dtype == dtype_of_backend
    assert torch.equal(result.value, composed(base, weights, coefficients, compute).to(dtype_of_backend))
    assert result.nonfinite.item() == 0
    assert result.nonfinite.dtype == torch.int64
    truth = composed(base, weights, coefficients, torch.float64)
    unit = torch.finfo(dtype_of_backend).eps / 2
    slack = 4 * T * torch.finfo(compute).eps
    torch.testing.assert_close(result.value.double(), truth, rtol=unit + slack, atol=slack + 1e-7 * unit)


@pytest.mark.parametrize("out_dtype", backends.FLOATING, ids=str)
def test_out_dtype(dtype_of_backend: torch.dtype, out_dtype: torch.dtype) -> None:
    base, weights, coefficients = problem((33, 70), dtype_of_backend, 3)
    result = ops.delta_add(base, weights, coefficients, out_dtype=out_dtype)
    compute = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    exact = composed(base, weights, coefficients, compute)
    assert torch.equal(result.value, round_once(exact, out_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_float64_weight_makes_the_sum_float64(each_backend: str, dtype: torch.dtype) -> None:
    base, weights, coefficients = problem((33, 70), dtype, 3)
    weights[1] = weights[1].double() + 1e-12
    result = ops.delta_add(base, weights, coefficients, out_dtype=torch.float64)
    assert torch.equal(result.value, composed(base, weights, coefficients, torch.float64))


@pytest.mark.parametrize("T", [1, 3])
def test_without_a_base_the_weights_are_the_differences(dtype_of_backend: torch.dtype, T: int) -> None:
    _, weights, coefficients = problem((33, 70), dtype_of_backend, T)
    compute = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    result = ops.delta_add(None, weights, coefficients)
    assert torch.equal(result.value, composed(None, weights, coefficients, compute).to(dtype_of_backend))
    zero = ops.delta_add(torch.zeros_like(weights[0]), weights, coefficients)
    assert torch.equal(result.value, zero.value)


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    base, weights, coefficients = problem((70, 33), dtype_of_backend, 2)
    expected = ops.delta_add(base, weights, coefficients).value
    turned = ops.delta_add(base.T.contiguous().T, [weights[0].T.contiguous().T, weights[1]], coefficients)
    assert torch.equal(turned.value, expected)
    assert turned.value.is_contiguous()
    sliced = ops.delta_add(base[::2, 3:20], [w[::2, 3:20] for w in weights], coefficients)
    assert torch.equal(sliced.value, expected[::2, 3:20])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_nonfinite_differences_are_counted(
    dtype_of_backend: torch.dtype, bad: float, coefficient: float
) -> None:
    base, weights, _ = problem((401, 399), dtype_of_backend, 2)
    weights[1][0, 0] = weights[1][400, 398] = bad
    weights[0][0, 0] = bad
    base[20, 20] = bad
    weights[1][20, 20] = bad
    result = ops.delta_add(base, weights, [0.25, coefficient])
    assert result.nonfinite.item() == 3
    assert not result.value[[0, 400, 20], [0, 398, 20]].isfinite().any()


def test_results_beyond_the_range_of_out_dtype_are_counted(each_backend: str) -> None:
    base = torch.tensor([6e4, 6e4, -6e4, 1.0])
    weight = torch.tensor([6.1e4, 7e4, -7e4, 2.0])
    result = ops.delta_add(base, [weight], [1.0], out_dtype=torch.float16)
    assert result.nonfinite.item() == 2
    assert ops.delta_add(base, [weight], [1.0]).nonfinite.item() == 0
    huge = torch.full((3,), 3e38)
    assert ops.delta_add(-huge, [huge], [0.0]).nonfinite.item() == 3


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_numbers(each_backend: str, size: float) -> None:
    base, weights, coefficients = problem((33, 70), torch.float32, 3)
    base, weights = base * size, [weight * size for weight in weights]
    result = ops.delta_add(base, weights, coefficients)
    assert torch.equal(result.value, composed(base, weights, coefficients, torch.float32))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_float64_is_rounded_to_16_bits_once(each_backend: str, out_dtype: torch.dtype, sign: int) -> None:
    # A trace above, at and below the middle of two neighbours, too small for float32.
    eps = torch.finfo(out_dtype).eps
    exact = sign * torch.tensor(
        [1 + eps / 2 + 1e-12, 1 + eps / 2, 1 + eps / 2 - 1e-12, 1e-60, 1e300], dtype=torch.float64
    )
    result = ops.delta_add(exact, [exact], [1.0], out_dtype=out_dtype)
    expected = sign * torch.tensor([1 + eps, 1, 1, 0, float("inf")], dtype=out_dtype)
    assert torch.equal(result.value, expected)


def test_native_result_does_not_depend_on_the_threads() -> None:
    if isinstance(backends.native_build_info(), str):
        pytest.skip("the native library is not built")
    base, weights, coefficients = problem((1501, 999), torch.bfloat16, 3)
    weights[2][700, 3] = float("inf")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with backends.backend("native"):
                results.append(ops.delta_add(base, weights, coefficients))
    finally:
        torch.set_num_threads(threads)
    with backends.backend("torch"):
        results.append(ops.delta_add(base, weights, coefficients))
    for result in results:
        assert torch.equal(result.value, results[0].value)
        assert result.nonfinite.item() == 1


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"weights\[1\] must have the shape of base, \(2, 3\), got \(3, 2\)"):
        ops.delta_add(x, [x, x.T], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"weights\[1\] must have the shape of weights\[0\]"):
        ops.delta_add(None, [x, x.T], [1.0, 1.0])
    with pytest.raises(ValueError, match="weights must be T >= 1 tensors, got none"):
        ops.delta_add(x, [], [])
    with pytest.raises(ValueError, match="coefficients must be 1, one for each of weights, got 2"):
        ops.delta_add(x, [x], [1.0, 2.0])
    with pytest.raises(ValueError, match="coefficients must be finite, got inf"):
        ops.delta_add(x, [x], [float("inf")])
    with pytest.raises(TypeError, match=r"weights\[0\] must have dtype .* got int8"):
        ops.delta_add(x, [x.to(torch.int8)], [1.0])
    with pytest.raises(TypeError, match="out_dtype must be bfloat16, float16, float32 or float64, got"):
        ops.delta_add(x, [x], [1.0], out_dtype=torch.int32)
