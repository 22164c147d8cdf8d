"""delta_add: a base plus a linear combination of task matrices, without forming the task matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dirmerge.backends import FLOATING, implements, native
from dirmerge.ops._registration import check_floating, compute_dtype, register, view


class DeltaAdd(NamedTuple):
    """A merged weight, and how many of its entries are NaN or infinite."""

    value: torch.Tensor
    nonfinite: torch.Tensor


def check_weights(op: str, base: torch.Tensor | None, weights: Sequence[torch.Tensor]) -> None:
    """Raises TypeError or ValueError unless weights are T ≥ 1 floating tensors of one shape, that of base."""
    tensors = {} if base is None else {"base": base}
    tensors |= {f"weights[{t}]": weight for t, weight in enumerate(weights)}
    check_floating(op, **tensors)
    if not weights:
        raise ValueError(f"{op}: weights must be T >= 1 tensors, got none")
    shape = (weights[0] if base is None else base).shape
    for t, weight in enumerate(weights):
        if weight.shape != shape:
            raise ValueError(
                f"{op}: weights[{t}] must have the shape of {'weights[0]' if base is None else 'base'}, "
                f"{tuple(shape)}, got {tuple(weight.shape)}"
            )


def check_out_dtype(op: str, out_dtype: torch.dtype | None) -> None:
    """Raises TypeError unless out_dtype is None or a supported floating dtype."""
    if out_dtype is not None and out_dtype not in FLOATING:
        raise TypeError(f"{op}: out_dtype must be bfloat16, float16, float32 or float64, got {out_dtype}")


def _check(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    out_dtype: torch.dtype | None,
) -> None:
    check_weights("delta_add", base, weights)
    check_out_dtype("delta_add", out_dtype)
    if len(coefficients) != len(weights):
        raise ValueError(
            f"delta_add: coefficients must be {len(weights)}, one for each of weights, got "
            f"{len(coefficients)}"
        )
    for coefficient in coefficients:
        if not math.isfinite(coefficient):
            raise ValueError(f"delta_add: coefficients must be finite, got {coefficient}")


def new_result(
    base: torch.Tensor | None, weights: Sequence[torch.Tensor], out_dtype: torch.dtype | None
) -> torch.Tensor:
    """Allocates the contiguous result of an op over a base and weights."""
    like = weights[0] if base is None else base
    return like.new_empty(like.shape, dtype=out_dtype or like.dtype)


def _fake(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(base, weights, coefficients, out_dtype)
    value = new_result(base, weights, out_dtype)
    return value, value.new_empty((), dtype=torch.int64)


_op = register(
    "delta_add",
    "(Tensor? base, Tensor[] weights, float[] coefficients, *, ScalarType? out_dtype=None) -> "
    "(Tensor value, Tensor nonfinite)",
    fake=_fake,
)

# Entries treated at a time: few enough for a CPU's cache, elsewhere enough to fill the device.
PIECE_CPU, PIECE = 1 << 16, 1 << 26


def round_once(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to nearest even. From float64 to 16 bits torch rounds to float32 first, and so twice.

    Here that first rounding is to odd: the last bit keeps a trace of what is dropped.
    """
    if x.dtype != torch.float64 or dtype.itemsize > 2:
        return x.to(dtype)
    nearest = x.float()
    widened = nearest.double()
    bits = nearest.view(torch.int32) - (widened.abs() > x.abs()).int()
    return (bits | (widened != x).int()).view(torch.float32).to(dtype)


@implements("delta_add", "torch")
def _delta_add_torch(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(*weights, *([] if base is None else [base]))
    value = new_result(base, weights, out_dtype)
    nonfinite = value.new_zeros((), dtype=torch.int64)
    origin = None if base is None else base.reshape(-1)
    flat = [weight.reshape(-1) for weight in weights]
    size = PIECE_CPU if value.is_cpu else PIECE
    for start in range(0, value.numel(), size):
        part = slice(start, start + size)
        out = value.view(-1)[part]
        from_base = None if origin is None else origin[part].to(dtype)
        total = out.new_zeros(out.shape, dtype=dtype)
        for weight, coefficient in zip(flat, coefficients, strict=True):
            difference = weight[part].to(dtype)
            if from_base is not None:
                difference = difference - from_base
            total += difference * coefficient
        out.copy_(round_once(total if from_base is None else from_base + total, out.dtype))
        # A difference that is not finite leaves a result that is not, even times 0.
        nonfinite += out.numel() - out.isfinite().count_nonzero()
    return value, nonfinite


@implements("delta_add", "native", devices=("cpu",))
def _delta_add_native(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    value = new_result(base, weights, out_dtype)
    origin = None if base is None else base.contiguous()
    contiguous = [weight.contiguous() for weight in weights]
    nonfinite = native().delta_add(
        None if origin is None else view(origin),
        [view(weight) for weight in contiguous],
        coefficients,
        view(value),
        torch.get_num_threads(),
    )
    return value, torch.tensor(nonfinite, dtype=torch.int64)


def delta_add(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    out_dtype: torch.dtype | None = None,
) -> DeltaAdd:
    """Computes W = W_0 + Σ_t c_t (W_t − W_0), rounded once, and the number of non-finite entries.

    One pass over all inputs: they are widened, subtracted, scaled and added as they are read; no difference
    is ever in memory as a whole.

    Args:
        base: any shape, bfloat16, float16, float32 or float64: W_0. None: W_0 = 0, the weights are the
            differences.
        weights: T ≥ 1 tensors W_t of the same shape; dtypes may differ.
        coefficients: T finite numbers c_t.
        out_dtype: dtype of the result; that of base, or of weights[0] without a base, by default.

    Returns:
        value: contiguous, of out_dtype; nonfinite: int64, 0-dim, the number of entries where a difference
        W_t − W_0 or the rounded result is NaN or infinite.

    Raises:
        TypeError: an input is not a floating tensor, or out_dtype is not a floating dtype.
        ValueError: shapes, devices or the number of coefficients do not fit, or a coefficient is not finite.

    Accuracy:
        Differences, products and sums in float32 (float64 if any input is), task after task, then one
        rounding to out_dtype, to nearest even. Natively the same bits for any number of threads.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        Task arithmetic: Ilharco et al., arXiv 2212.04089, section 2.
    """
    weights, coefficients = list(weights), [float(coefficient) for coefficient in coefficients]
    _check(base, weights, coefficients, out_dtype)
    return DeltaAdd(*_op(base, weights, coefficients, out_dtype=out_dtype))
