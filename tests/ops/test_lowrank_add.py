from __future__ import annotations

import pytest
import torch

from dirmerge import backends, ops

OP = "lowrank_add"
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}


def truth(base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return base.double() + scale * (left.double() @ right.double().T)


def factors(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k) / max(k, 1) ** 0.5, torch.randn(n, k)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(33, 70, 5), (1, 199, 3), (199, 1, 4), (70, 33, 0), (0, 5, 2), (5, 0, 2), (64, 64, 64)]
)
@pytest.mark.parametrize("out_dtype", [None, *backends.FLOATING], ids=str)
def test_is_the_sum_rounded_to_the_output_dtype(
    dtype_of_backend: torch.dtype, out_dtype: torch.dtype | None, m: int, n: int, k: int
) -> None:
    base = torch.randn(m, n).to(dtype_of_backend)
    left, right = factors(m, n, k)
    found = ops.lowrank_add(base, left, right, scale=0.75, out_dtype=out_dtype)
    expected = truth(base, left, right, 0.75)
    assert found.dtype == (out_dtype or dtype_of_backend)
    unit = max(UNIT[found.dtype], 1e-14 if dtype_of_backend == torch.float64 else 1e-6)
    # Half a unit of the output for the one rounding, and the arithmetic's error relative to the terms.
    magnitude = base.double().abs() + 0.75 * (left.double().abs() @ right.double().abs().T)
    assert ((found.double() - expected).abs() <= unit * expected.abs() + 4e-7 * magnitude + 1e-7).all()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even(dtype_of_backend: torch.dtype, out_dtype: torch.dtype) -> None:
    # Integers and halves that float32 adds exactly, and that lie between, on and at ties of 16-bit numbers.
    base = torch.arange(-200, 200).reshape(20, 20).to(dtype_of_backend)
    left = torch.randint(-32, 33, (20, 3)).float()
    right = torch.randint(-32, 33, (20, 3)).float()
    for scale in (1.0, 0.5, 4.0):
        expected = truth(base, left, right, scale)
        assert torch.equal(expected.float().double(), expected)
        found = ops.lowrank_add(base, left, right, scale=scale, out_dtype=out_dtype)
        assert torch.equal(found, expected.to(out_dtype))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_boundary(dtype_of_backend: torch.dtype, out_dtype: torch.dtype) -> None:
    # The numbers midway between neighbours of out_dtype, and just off midway, subnormals included.
    every = torch.arange(0, 2**15 - 1, dtype=torch.int32)
    lower = every.to(torch.int16).view(out_dtype).float()
    upper = (every + 1).to(torch.int16).view(out_dtype).float()
    use = upper.isfinite()
    middle = lower[use] + (upper[use] - lower[use]) / 2
    update = torch.cat([middle, middle * (1 + 2**-22), middle * (1 - 2**-22), lower[use], -middle])
    base = torch.zeros(update.numel(), 1, dtype=dtype_of_backend)
    found = ops.lowrank_add(base, update[:, None], torch.ones(1, 1), out_dtype=out_dtype)
    assert torch.equal(found[:, 0], update.double().to(out_dtype))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_overflow_and_nan(dtype_of_backend: torch.dtype, out_dtype: torch.dtype) -> None:
    limit = torch.finfo(out_dtype).max
    update = torch.tensor([limit, -limit, 3.4e38, -3.4e38, float("inf"), float("nan"), -float("nan")])
    found = ops.lowrank_add(
        torch.zeros(7, 1, dtype=dtype_of_backend), update[:, None], torch.ones(1, 1), out_dtype=out_dtype
    )[:, 0]
    infinity = float("inf")
    assert found[:5].tolist() == [limit, -limit, infinity, -infinity, infinity]
    assert found[5:].isnan().all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFF8000 - 2**32, 0xFF80FFFF - 2**32])
def test_no_nan_rounds_to_a_number(bits: int) -> None:
    if isinstance(backends.native_build_info(), str):
        pytest.skip("the native library is not built")
    nan = torch.tensor([[bits]], dtype=torch.int64).to(torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with backends.backend("native"):
            found = ops.lowrank_add(torch.zeros(1, 1, dtype=dtype), nan, torch.ones(1, 1))
        assert found.isnan().all()


def test_panels_cover_every_row(each_backend: str) -> None:
    # More entries than one panel holds, and a last panel that is not full.
    base = torch.randn(1300, 2000).bfloat16()
    left, right = factors(1300, 2000, 3)
    found = ops.lowrank_add(base, left, right, scale=-2)
    error = (found.double() - truth(base, left, right, -2)).abs()
    assert (error <= 2**-8 * truth(base, left, right, -2).abs() + 1e-6).all()


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    base = torch.randn(80, 60).to(dtype_of_backend)
    left, right = factors(30, 40, 12)
    for view in (base.T[::2, :40], base[::2, 10:50][:30]):
        found = ops.lowrank_add(view, left[:, ::3], right[:, ::3])
        expected = ops.lowrank_add(view.contiguous(), left[:, ::3].contiguous(), right[:, ::3].contiguous())
        torch.testing.assert_close(found, expected, rtol=UNIT[dtype_of_backend], atol=1e-6)
        assert found.is_contiguous()


def test_factors_of_any_dtype(dtype_of_backend: torch.dtype) -> None:
    base = torch.randn(20, 30).to(dtype_of_backend)
    left, right = factors(20, 30, 4)
    for left_dtype, right_dtype in [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)]:
        found = ops.lowrank_add(base, left.to(left_dtype), right.to(right_dtype))
        expected = truth(base, left.to(left_dtype), right.to(right_dtype), 1.0)
        torch.testing.assert_close(found.double(), expected, rtol=UNIT[dtype_of_backend], atol=2e-6)


def test_the_inputs_are_left_alone(dtype_of_backend: torch.dtype) -> None:
    base = torch.randn(6, 6).to(dtype_of_backend)
    kept = base.clone()
    ops.lowrank_add(base, *factors(6, 6, 2), scale=3.0)
    assert torch.equal(base, kept)


def test_arguments_that_do_not_fit_are_named() -> None:
    base = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"left must have shape \(4, k\) and right \(5, k\)"):
        ops.lowrank_add(base, torch.zeros(4, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="must be matrices"):
        ops.lowrank_add(torch.zeros(4), torch.zeros(4, 2), torch.zeros(5, 2))
    with pytest.raises(TypeError, match=r"out_dtype must be .* got torch.int8"):
        ops.lowrank_add(base, torch.zeros(4, 2), torch.zeros(5, 2), out_dtype=torch.int8)
