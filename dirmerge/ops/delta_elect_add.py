"""delta_elect_add: a base plus the elected mean of the task matrices, without forming the task matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dirmerge.backends import implements, native
from dirmerge.ops._registration import check_floating, compute_dtype, register, view
from dirmerge.ops.delta_add import (
    PIECE,
    PIECE_CPU,
    DeltaAdd,
    check_out_dtype,
    check_weights,
    new_result,
    round_once,
)
from dirmerge.ops.elect_merge import elect_merge


def _check(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    thresholds: torch.Tensor | None,
    election_weights: Sequence[float],
    scale: float,
    out_dtype: torch.dtype | None,
) -> None:
    check_weights("delta_elect_add", base, weights)
    check_out_dtype("delta_elect_add", out_dtype)
    T = len(weights)
    if thresholds is not None:
        check_floating("delta_elect_add", weights=weights[0], thresholds=thresholds)
        if tuple(thresholds.shape) != (T,):
            raise ValueError(
                f"delta_elect_add: thresholds must have shape ({T},), one for each of weights, got "
                f"{tuple(thresholds.shape)}"
            )
    if len(election_weights) != T:
        raise ValueError(
            f"delta_elect_add: election_weights must be {T}, one for each of weights, got "
            f"{len(election_weights)}"
        )
    for weight in election_weights:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"delta_elect_add: election_weights must be finite and >= 0, got {weight}")
    if not math.isfinite(scale):
        raise ValueError(f"delta_elect_add: scale must be finite, got {scale}")


def _fake(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    thresholds: torch.Tensor | None,
    election_weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(base, weights, thresholds, election_weights, scale, out_dtype)
    value = new_result(base, weights, out_dtype)
    return value, value.new_empty((), dtype=torch.int64)


_op = register(
    "delta_elect_add",
    "(Tensor? base, Tensor[] weights, Tensor? thresholds, float[] election_weights, *, float scale, "
    "ScalarType? out_dtype=None) -> (Tensor value, Tensor nonfinite)",
    fake=_fake,
)


@implements("delta_elect_add", "torch")
def _delta_elect_add_torch(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    thresholds: torch.Tensor | None,
    election_weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(*weights, *([] if base is None else [base]))
    value = new_result(base, weights, out_dtype)
    nonfinite = value.new_zeros((), dtype=torch.int64)
    origin = None if base is None else base.reshape(-1)
    flat = [weight.reshape(-1) for weight in weights]
    size = max(1, (PIECE_CPU if value.is_cpu else PIECE) // len(flat))
    for start in range(0, value.numel(), size):
        part = slice(start, start + size)
        out = value.view(-1)[part]
        differences = torch.stack([weight[part].to(dtype) for weight in flat])
        from_base = None if origin is None else origin[part].to(dtype)
        if from_base is not None:
            differences -= from_base
        merged = elect_merge(differences, thresholds, election_weights) * scale
        out.copy_(round_once(merged if from_base is None else from_base + merged, out.dtype))
        # A difference that is not finite wins its election, or makes it NaN.
        nonfinite += out.numel() - out.isfinite().count_nonzero()
    return value, nonfinite


@implements("delta_elect_add", "native", devices=("cpu",))
def _delta_elect_add_native(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    thresholds: torch.Tensor | None,
    election_weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    value = new_result(base, weights, out_dtype)
    origin = None if base is None else base.contiguous()
    contiguous = [weight.contiguous() for weight in weights]
    if thresholds is not None:
        dtype = compute_dtype(*weights, *([] if base is None else [base]))
        thresholds = thresholds.to(dtype).contiguous()
    nonfinite = native().delta_elect_add(
        None if origin is None else view(origin),
        [view(weight) for weight in contiguous],
        None if thresholds is None else view(thresholds),
        election_weights,
        scale,
        view(value),
        torch.get_num_threads(),
    )
    return value, torch.tensor(nonfinite, dtype=torch.int64)


def delta_elect_add(
    base: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    thresholds: torch.Tensor | None,
    election_weights: Sequence[float],
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> DeltaAdd:
    """Computes W = W_0 + scale · D, rounded once, D the elected mean of the W_t − W_0 (see elect_merge).

    One pass over all inputs: no difference is ever in memory as a whole.

    Args:
        base: any shape, bfloat16, float16, float32 or float64: W_0. None: W_0 = 0, the weights are the
            differences.
        weights: T ≥ 1 tensors W_t of the same shape; dtypes may differ.
        thresholds: (T,), any floating dtype: entries of W_t − W_0 below thresholds[t] in magnitude count as
            0. None: nothing is trimmed.
        election_weights: T finite numbers >= 0.
        scale: finite factor of the elected mean.
        out_dtype: dtype of the result; that of base, or of weights[0] without a base, by default.

    Returns:
        value: contiguous, of out_dtype; nonfinite: int64, 0-dim, the number of entries where a difference
        W_t − W_0 or the rounded result is NaN or infinite.

    Raises:
        TypeError: an input is not a floating tensor, or out_dtype is not a floating dtype.
        ValueError: shapes, devices, numbers of weights or their values do not fit, or scale is not finite.

    Accuracy:
        Differences, election and sum in float32 (float64 if any input is), task after task, D with the bits
        of elect_merge; then one rounding to out_dtype, to nearest even. Natively the same bits for any number
        of threads.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        TIES-Merging (arXiv 2306.01708), section 3.
    """
    weights, election_weights = list(weights), [float(weight) for weight in election_weights]
    _check(base, weights, thresholds, election_weights, scale, out_dtype)
    return DeltaAdd(*_op(base, weights, thresholds, election_weights, scale=scale, out_dtype=out_dtype))
