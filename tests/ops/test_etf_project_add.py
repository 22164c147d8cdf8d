from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops
from dirmerge.linalg import simplex_etf

OP = "etf_project_add"
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}


def truth(base: torch.Tensor, update: torch.Tensor, q: torch.Tensor, K: int, scale: float) -> torch.Tensor:
    q, update = q.double(), update.double()
    return base.double() + scale * K / (K - 1) * (update - torch.outer(q, q @ update) / K)


def sample(m: int, n: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense update and the sum of K columns of norm 1."""
    return torch.randn(m, n), torch.randn(m) * (K / max(m, 1)) ** 0.5


@pytest.mark.parametrize(("m", "n"), [(33, 70), (1, 199), (199, 1), (70, 33), (0, 5), (5, 0), (300, 130)])
@pytest.mark.parametrize("out_dtype", [None, *backends.FLOATING], ids=str)
def test_is_the_sum_rounded_to_the_output_dtype(
    dtype_of_backend: torch.dtype, out_dtype: torch.dtype | None, m: int, n: int
) -> None:
    base = torch.randn(m, n).to(dtype_of_backend)
    update, q = sample(m, n, 7)
    found = ops.etf_project_add(base, update, q, 7, scale=0.75, out_dtype=out_dtype)
    expected = truth(base, update, q, 7, 0.75)
    assert found.dtype == (out_dtype or dtype_of_backend)
    unit = max(UNIT[found.dtype], 1e-14 if dtype_of_backend == torch.float64 else 1e-6)
    # Half a unit of the output for the one rounding, which float16's subnormal numbers have too, and the
    # arithmetic's error relative to the terms.
    products = torch.outer(q.abs(), q.abs() @ update.abs()).double() / 7
    magnitude = base.double().abs() + update.double().abs() + products
    subnormal = 2**-25 if found.dtype == torch.float16 else 0
    rest = 1e-14 if dtype_of_backend == torch.float64 else 1e-6
    assert ((found.double() - expected).abs() <= unit * expected.abs() + rest * magnitude + subnormal).all()


@pytest.mark.parametrize("K", [2, 5])
def test_is_the_gram_operator_of_a_simplex_etf(K: int) -> None:
    frame = torch.linalg.qr(torch.randn(12, K, dtype=torch.float64)).Q
    update = frame @ torch.randn(K, 20, dtype=torch.float64)
    base = torch.randn(12, 20, dtype=torch.float64)
    vertices = simplex_etf(K, 12, frame=frame, dtype=torch.float64)
    expected = base + 0.3 * vertices @ (vertices.T @ update)
    found = ops.etf_project_add(base, update, frame.sum(1), K, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_agrees_with_the_factored_form(dtype_of_backend: torch.dtype) -> None:
    frame = torch.linalg.qr(torch.randn(60, 9)).Q
    core, right = torch.randn(9, 9), torch.randn(40, 9)
    base = torch.randn(60, 40).to(dtype_of_backend)
    found = ops.etf_project_add(base, frame @ core @ right.T, frame.sum(1), 9, scale=0.5)
    expected = base.double() + 0.5 * (frame @ ops.etf_project(core) @ right.T).double()
    unit = max(UNIT[dtype_of_backend], 1e-6)
    assert ((found.double() - expected).abs() <= unit * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even(dtype_of_backend: torch.dtype, out_dtype: torch.dtype) -> None:
    # q = 0 and K = 2 leave base + 2 D: integers and quarters at and beside ties of 16-bit numbers.
    base = torch.arange(-200, 200).reshape(20, 20).to(dtype_of_backend)
    update = torch.randint(-2000, 2000, (20, 20)) / 8
    exact = base.double() + 2 * update.double()
    found = ops.etf_project_add(base, update, torch.zeros(20), 2, out_dtype=out_dtype)
    assert torch.equal(found, exact.to(out_dtype))


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    base, update = torch.randn(80, 60).to(dtype_of_backend), torch.randn(60, 80)
    q = torch.randn(30, 3)[:, 1]
    for view, other in ((base.T[::2, :40], update[::2, :40]), (base[:30, 10:50], update[10:50, :30].T)):
        found = ops.etf_project_add(view, other, q, 5)
        expected = ops.etf_project_add(view.contiguous(), other.contiguous(), q.contiguous(), 5)
        torch.testing.assert_close(found, expected, rtol=UNIT[dtype_of_backend], atol=2e-5)
        assert found.is_contiguous()


def test_updates_of_any_dtype(dtype_of_backend: torch.dtype) -> None:
    base = torch.randn(20, 30).to(dtype_of_backend)
    update, q = sample(20, 30, 4)
    for update_dtype, q_dtype in [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)]:
        arguments = base, update.to(update_dtype), q.to(q_dtype)
        expected = truth(*arguments, 4, 1.0)
        found = ops.etf_project_add(*arguments, 4)
        torch.testing.assert_close(found.double(), expected, rtol=UNIT[dtype_of_backend], atol=3e-6)


def test_the_inputs_are_left_alone(dtype_of_backend: torch.dtype) -> None:
    inputs = torch.randn(6, 6).to(dtype_of_backend), torch.randn(6, 6).to(dtype_of_backend), torch.randn(6)
    kept = [x.clone() for x in inputs]
    ops.etf_project_add(*inputs, 3, scale=3.0)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))


def test_nan_stays_in_its_column(dtype_of_backend: torch.dtype) -> None:
    update = torch.randn(5, 4)
    update[2, 1] = float("nan")
    found = ops.etf_project_add(torch.zeros(5, 4, dtype=dtype_of_backend), update, torch.ones(5), 3)
    assert found.isnan().any(0).tolist() == [False, True, False, False]


def test_arguments_that_do_not_fit_are_named() -> None:
    base, q = torch.zeros(4, 5), torch.zeros(4)
    with pytest.raises(ValueError, match=r"matrices of one shape, got \(4, 5\) and \(5, 4\)"):
        ops.etf_project_add(base, base.T, q, 3)
    with pytest.raises(ValueError, match=r"frame_sum must have shape \(4,\)"):
        ops.etf_project_add(base, base, torch.zeros(5), 3)
    with pytest.raises(ValueError, match="K must be at least 2, got 1"):
        ops.etf_project_add(base, base, q, 1)
    with pytest.raises(TypeError, match=r"out_dtype must be .* got torch.int8"):
        ops.etf_project_add(base, base, q, 3, out_dtype=torch.int8)
