"""elect_merge: sign election with a disjoint mean over the tasks, as TIES and DC-Merge use it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dirmerge.backends import cuda, implements, native
from dirmerge.backends.launch import elect_operands
from dirmerge.ops._registration import check_floating, compute_dtype, register, view


def _check(
    x: torch.Tensor,
    thresholds: torch.Tensor | None,
    weights: Sequence[float] | None,
) -> None:
    check_floating("elect_merge", x=x)
    if x.dim() < 2 or x.shape[0] == 0:
        raise ValueError(f"elect_merge: x must have shape (T, ...) with T >= 1, got {tuple(x.shape)}")
    T = x.shape[0]
    if thresholds is not None:
        check_floating("elect_merge", x=x, thresholds=thresholds)
        if tuple(thresholds.shape) != (T,):
            raise ValueError(
                f"elect_merge: thresholds must have shape ({T},), one for each x[t], got "
                f"{tuple(thresholds.shape)}"
            )
    if weights is not None:
        if len(weights) != T:
            raise ValueError(f"elect_merge: weights must be {T}, one for each x[t], got {len(weights)}")
        for weight in weights:
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"elect_merge: weights must be finite and >= 0, got {weight}")


def _fake(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    _check(x, thresholds, weights)
    return x.new_empty(x.shape[1:])


_op = register(
    "elect_merge",
    "(Tensor x, Tensor? thresholds=None, float[]? weights=None) -> Tensor",
    fake=_fake,
)


@implements("elect_merge", "torch")
def _elect_merge_torch(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    if thresholds is not None:
        thresholds = thresholds.to(compute_dtype(x))
    # The sign of the sum is that of the heavier side, so both are summed apart. clamp keeps NaN on both.
    dtype = compute_dtype(x)
    positive = x.new_zeros(x.shape[1:], dtype=dtype)
    negative, positive_weight, negative_weight = (torch.zeros_like(positive) for _ in range(3))
    for t in range(x.shape[0]):
        kept = x[t].to(dtype)
        if thresholds is not None:
            kept = kept.masked_fill(kept.abs() < thresholds[t], 0)
        weight = 1.0 if weights is None else weights[t]
        positive += kept.clamp(min=0) * weight
        negative += kept.clamp(max=0) * weight
        positive_weight += (kept > 0).to(dtype) * weight
        negative_weight += (kept < 0).to(dtype) * weight
    # Neither side is heavier: the sum is 0, or NaN where an entry is.
    merged = positive + negative
    merged = torch.where(positive > -negative, positive / positive_weight, merged)
    merged = torch.where(positive < -negative, negative / negative_weight, merged)
    return merged.to(x.dtype)


@implements("elect_merge", "native", devices=("cpu",))
def _elect_merge_native(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    x, limits, _, merged = elect_operands(x, thresholds, None)
    native().elect_merge(
        view(x),
        None if limits is None else view(limits),
        weights,
        view(merged),
        torch.get_num_threads(),
    )
    return merged


implements("elect_merge", "native", devices=("cuda",))(cuda.elect_merge)


def elect_merge(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Merges by elected sign: s = sign Σ_t w_t x_t, result = Σ w_t x_t / Σ w_t over the t with sign x_t = s.

    Per entry, one read of the T values: the positive and the negative ones are summed apart, the heavier
    side wins, and its mean is the result. Entries with |x[t]| < thresholds[t] count as 0, and a 0 has no
    sign; where the sum is 0 so is the result.

    Args:
        x: (T, ...), any floating dtype.
        thresholds: (T,), any floating dtype; None keeps everything. An entry equal to its threshold is kept.
        weights: T numbers >= 0; None weighs all tasks alike.

    Returns:
        x.shape[1:], the dtype of x. An entry that is NaN in any task is NaN.

    Raises:
        TypeError: x or thresholds is not a floating tensor.
        ValueError: shapes or weights do not fit.

    Accuracy:
        Sums in float32 (float64 for float64), task after task; rounded once to the dtype of x.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        TIES-Merging (arXiv 2306.01708), section 3; DC-Merge (arXiv 2603.06242), aggregation.
    """
    if weights is not None:
        weights = [float(weight) for weight in weights]
    _check(x, thresholds, weights)
    result: torch.Tensor = _op(x, thresholds, weights)
    return result
