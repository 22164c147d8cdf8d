from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dirmerge import backends, ops

OP = "elect_merge"


def truth(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: list[float] | None = None,
) -> torch.Tensor:
    """The definition, entry by entry in Python floats."""
    T = x.shape[0]
    w = weights or [1.0] * T
    flat = x.double().reshape(T, -1)
    out = torch.zeros(flat.shape[1], dtype=torch.float64)
    for i in range(flat.shape[1]):
        kept = [
            0.0 if thresholds is not None and abs(v) < float(thresholds[t]) else v
            for t, v in enumerate(flat[:, i].tolist())
        ]
        total = sum(a * b for a, b in zip(w, kept, strict=True))
        sign = (total > 0) - (total < 0)
        chosen = [t for t in range(T) if kept[t] * sign > 0]
        if chosen:
            out[i] = sum(w[t] * kept[t] for t in chosen) / sum(w[t] for t in chosen)
    return out.reshape(x.shape[1:])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol[found.dtype], atol=0)


@pytest.mark.parametrize("shape", [(8, 33, 70), (1, 5, 5), (2, 1, 199), (3, 199, 1), (5, 700)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_is_the_mean_of_the_elected_side(
    dtype_of_backend: torch.dtype, shape: tuple[int, ...], weighted: bool, filtered: bool
) -> None:
    x = torch.randn(shape).to(dtype_of_backend)
    weights = [0.5 + t for t in range(shape[0])] if weighted else None
    thresholds = torch.linspace(0.1, 1.5, shape[0]) if filtered else None
    found = ops.elect_merge(x, thresholds, weights)
    assert found.dtype == dtype_of_backend
    assert_near(found, truth(x, thresholds, weights))


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(40, 40, 5).to(dtype_of_backend).permute(2, 0, 1)
    assert_near(ops.elect_merge(x), truth(x))
    rows = torch.randn(5, 40, 60).to(dtype_of_backend)[::2, :, 7:47]
    assert_near(ops.elect_merge(rows), truth(rows))
    assert_near(ops.elect_merge(rows.mT), truth(rows.mT))


def test_what_is_empty_stays_empty_whatever_its_strides(dtype_of_backend: torch.dtype) -> None:
    x = torch.empty(5, 0, 3, dtype=dtype_of_backend)
    for view in (x, x.mT, x.permute(2, 1, 0)):
        assert ops.elect_merge(view).shape == view.shape[1:]


def test_opposite_entries_cancel_to_zero(dtype_of_backend: torch.dtype) -> None:
    x = torch.tensor([[3.0, 1, 0, -0.0], [-3, 2, 0, 0], [0, -3, 0, -0.0]], dtype=dtype_of_backend)
    assert torch.equal(ops.elect_merge(x), torch.zeros(4, dtype=dtype_of_backend))


def test_an_entry_equal_to_its_threshold_is_kept(dtype_of_backend: torch.dtype) -> None:
    x = torch.tensor([[0.5, -0.5, 0.25, 4], [2, 2, 0.25, 1]], dtype=dtype_of_backend)
    found = ops.elect_merge(x, torch.tensor([0.5, 2.0]))
    assert found.tolist() == [1.25, 2, 0, 4]


def test_thresholds_that_keep_everything(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(2, 30).to(dtype_of_backend)
    expected = ops.elect_merge(x)
    for threshold in (0.0, -1.0, float("nan")):
        assert torch.equal(ops.elect_merge(x, torch.full((2,), threshold)), expected)


def test_a_weight_of_zero_removes_its_task(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype_of_backend)
    assert torch.equal(ops.elect_merge(x, weights=[1, 0, 2]), ops.elect_merge(x[::2], weights=[1, 2]))
    assert torch.equal(ops.elect_merge(x, weights=[0, 0, 0]), torch.zeros_like(x[0]))


def test_weights_may_be_a_tensor(each_backend: str) -> None:
    x = torch.randn(3, 40)
    weights = [0.25, 1.0, 2.0]
    assert torch.equal(ops.elect_merge(x, weights=torch.tensor(weights)), ops.elect_merge(x, weights=weights))


def test_nan_in_any_task_is_nan_in_the_result(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype_of_backend)
    x[1, 7] = float("nan")
    x[2, 9] = -float("nan")
    found = ops.elect_merge(x, torch.tensor([0.1, 0.1, 0.1]))
    assert found.isnan().nonzero().flatten().tolist() == [7, 9]


def test_infinity_is_elected(dtype_of_backend: torch.dtype) -> None:
    x = torch.tensor([[float("inf"), float("inf")], [-1, -float("inf")]], dtype=dtype_of_backend)
    found = ops.elect_merge(x)
    assert found[0] == float("inf")
    assert found[1].isnan()


def test_one_task_is_its_filtered_self(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(1, 33, 33).to(dtype_of_backend)
    expected = torch.where(x[0].abs() < 1, torch.zeros_like(x[0]), x[0])
    assert torch.equal(ops.elect_merge(x, torch.ones(1)), expected)


def test_backends_agree_to_the_bit_on_long_rows() -> None:
    if isinstance(backends.native_build_info(), str):
        pytest.skip("the native library is not built")
    x = torch.randn(6, 700, 1001)
    arguments = (x, torch.rand(6), [1.0, 2, 0.3, 1, 1, 5])
    results = {}
    for name in ("torch", "native"):
        with backends.backend(name):
            results[name] = ops.elect_merge(*arguments)
    assert torch.equal(results["torch"], results["native"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_floats_follow_the_definition(data: st.DataObject) -> None:
    # Multiples of 1/8 below 2^10: every sum is exact, so that the definition decides ties as the op must.
    numbers = st.integers(-8192, 8192).map(lambda i: i / 8)
    T = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(1, 20))
    x = torch.tensor(data.draw(st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=T, max_size=T)))
    thresholds = torch.tensor(data.draw(st.lists(st.integers(0, 900), min_size=T, max_size=T))).float()
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=T, max_size=T))
    expected = truth(x, thresholds, weights)
    for name in ("torch", "native"):
        if name == "native" and isinstance(backends.native_build_info(), str):
            continue
        with backends.backend(name):
            assert_near(ops.elect_merge(x, thresholds, weights), expected)


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match=r"T >= 1, got \(0, 4\)"):
        ops.elect_merge(torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"thresholds must have shape \(2,\).* got \(3,\)"):
        ops.elect_merge(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"weights must be 2, .* got 1"):
        ops.elect_merge(x, weights=[1.0])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"finite and >= 0, got {weight}"):
            ops.elect_merge(x, weights=[1.0, weight])
