from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops
from dirmerge.ops.delta_add import round_once

OP = "delta_elect_add"
SHAPES = [(33, 70), (1, 199), (199, 1), (5000,), (0, 7), (), (2, 3, 5)]
MIXED = [torch.float16, torch.float32, torch.bfloat16]


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, T: int, *, is_mixed: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[float]]:
    base = torch.randn(shape, dtype=torch.float64)
    weights = [
        (base + 0.1 * torch.randn(shape, dtype=torch.float64)).to(MIXED[t % 3] if is_mixed else dtype)
        for t in range(T)
    ]
    return base.to(dtype), weights, torch.linspace(0.03, 0.09, T), [1 / (t + 1) for t in range(T)]


def elected(x: torch.Tensor, thresholds: torch.Tensor | None, weights: list[float]) -> torch.Tensor:
    """The definition, in float64: sign of the weighted sum, weighted mean of the entries of that sign."""
    x = x.double()
    if thresholds is not None:
        x = x.masked_fill(x.abs() < thresholds.double().view(-1, *[1] * (x.dim() - 1)), 0)
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (x.dim() - 1))
    sign = (w * x).sum(0).sign()
    agrees = (x.sign() == sign) & (sign != 0)
    return ((w * x * agrees).sum(0) / (w * agrees).sum(0)).nan_to_num(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["same", "mixed"])
@pytest.mark.parametrize("is_trimmed", [False, True], ids=["whole", "trimmed"])
def test_value_is_elect_merge_of_the_differences_added_once(
    dtype_of_backend: torch.dtype, shape: tuple[int, ...], T: int, is_mixed: bool, is_trimmed: bool
) -> None:
    base, weights, given, election_weights = problem(shape, dtype_of_backend, T, is_mixed=is_mixed)
    thresholds = given if is_trimmed else None
    compute = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    result = ops.delta_elect_add(base, weights, thresholds, election_weights, scale=0.7)
    differences = torch.stack([weight.to(compute) - base.to(compute) for weight in weights])
    merged = ops.elect_merge(differences.reshape(T, -1), thresholds, election_weights).view(shape)
    assert result.value.dtype == dtype_of_backend
    assert torch.equal(result.value, (base.to(compute) + merged * 0.7).to(dtype_of_backend))
    assert result.nonfinite.item() == 0
    assert result.nonfinite.dtype == torch.int64
    truth = base.double() + 0.7 * elected(differences, thresholds, election_weights)
    unit = torch.finfo(dtype_of_backend).eps / 2
    slack = 4 * T * torch.finfo(compute).eps
    torch.testing.assert_close(result.value.double(), truth, rtol=unit + slack, atol=slack + 1e-7 * unit)


@pytest.mark.parametrize("out_dtype", backends.FLOATING, ids=str)
@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no_base"])
def test_out_dtype_and_no_base(dtype_of_backend: torch.dtype, out_dtype: torch.dtype, has_base: bool) -> None:
    base, weights, thresholds, election_weights = problem((33, 70), dtype_of_backend, 3)
    compute = torch.float64 if dtype_of_backend == torch.float64 else torch.float32
    origin = base.to(compute) if has_base else torch.zeros(33, 70, dtype=compute)
    differences = torch.stack([weight.to(compute) - origin for weight in weights])
    merged = ops.elect_merge(differences, thresholds, election_weights)
    result = ops.delta_elect_add(
        base if has_base else None, weights, thresholds, election_weights, scale=2, out_dtype=out_dtype
    )
    assert torch.equal(result.value, round_once(origin + merged * 2, out_dtype))


def test_an_entry_equal_to_its_threshold_is_kept(each_backend: str) -> None:
    base = torch.zeros(3)
    weights = [torch.tensor([0.5, 0.25, -0.5])]
    result = ops.delta_elect_add(base, weights, torch.tensor([0.5]), [1.0], scale=1.0)
    assert result.value.tolist() == [0.5, 0.0, -0.5]


def test_a_drawn_election_leaves_the_base(each_backend: str) -> None:
    base = torch.ones(2)
    result = ops.delta_elect_add(base, [base + 1, base - 1], None, [1.0, 1.0], scale=1.0)
    assert torch.equal(result.value, base)


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    base, weights, thresholds, election_weights = problem((70, 33), dtype_of_backend, 2)
    spread = torch.stack([thresholds, -thresholds], 1)[:, 0]
    expected = ops.delta_elect_add(base, weights, thresholds, election_weights, scale=1.0).value
    sliced = ops.delta_elect_add(
        base[::2, 3:20], [w[::2, 3:20] for w in weights], spread, election_weights, scale=1.0
    )
    assert torch.equal(sliced.value, expected[::2, 3:20])
    assert sliced.value.is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight", [0.5, 0.0])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_nonfinite_differences_are_counted(
    dtype_of_backend: torch.dtype, bad: float, weight: float, scale: float
) -> None:
    base, weights, thresholds, _ = problem((401, 399), dtype_of_backend, 2)
    weights[1][0, 0] = weights[1][400, 398] = bad
    weights[0][0, 0] = -bad
    base[20, 20] = bad
    for given in (None, thresholds):
        result = ops.delta_elect_add(base, weights, given, [1.0, weight], scale=scale)
        assert result.nonfinite.item() == 3
        assert not result.value[[0, 400, 20], [0, 398, 20]].isfinite().any()


def test_results_beyond_the_range_of_out_dtype_are_counted(each_backend: str) -> None:
    base = torch.tensor([6e4, 6e4, -6e4, 1.0])
    weight = torch.tensor([6.1e4, 7e4, -7e4, 2.0])
    result = ops.delta_elect_add(base, [weight], None, [1.0], scale=1.0, out_dtype=torch.float16)
    assert result.nonfinite.item() == 2
    assert ops.delta_elect_add(base, [weight], None, [1.0], scale=1.0).nonfinite.item() == 0


def test_native_result_does_not_depend_on_the_threads() -> None:
    if isinstance(backends.native_build_info(), str):
        pytest.skip("the native library is not built")
    base, weights, thresholds, election_weights = problem((1501, 999), torch.bfloat16, 3)
    weights[2][700, 3] = float("inf")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with backends.backend("native"):
                results.append(ops.delta_elect_add(base, weights, thresholds, election_weights, scale=1.0))
    finally:
        torch.set_num_threads(threads)
    with backends.backend("torch"):
        results.append(ops.delta_elect_add(base, weights, thresholds, election_weights, scale=1.0))
    for result in results:
        assert torch.equal(result.value, results[0].value)
        assert result.nonfinite.item() == 1


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"weights\[0\] must have the shape of base"):
        ops.delta_elect_add(x, [x.T], None, [1.0], scale=1.0)
    with pytest.raises(ValueError, match=r"thresholds must have shape \(1,\), one for each of weights"):
        ops.delta_elect_add(x, [x], torch.zeros(2), [1.0], scale=1.0)
    with pytest.raises(ValueError, match="election_weights must be 1, one for each of weights, got 2"):
        ops.delta_elect_add(x, [x], None, [1.0, 1.0], scale=1.0)
    with pytest.raises(ValueError, match=r"election_weights must be finite and >= 0, got -1\.0"):
        ops.delta_elect_add(x, [x], None, [-1.0], scale=1.0)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        ops.delta_elect_add(x, [x], None, [1.0], scale=float("nan"))
    with pytest.raises(TypeError, match="out_dtype must be bfloat16, float16, float32 or float64, got"):
        ops.delta_elect_add(x, [x], None, [1.0], scale=1.0, out_dtype=torch.int32)
