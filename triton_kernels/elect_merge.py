"""elect_merge: threshold, sign election and disjoint mean over the tasks, one read and one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import DTYPES, INTERPRETED, divided, launch, rounded

from dirmerge.backends.launch import compute_dtype, elect_operands

BLOCK = 1024


@triton.jit
def elect_merge_kernel(
    x_ptr,
    thresholds_ptr,
    weights_ptr,
    result_ptr,
    T,
    count,
    stride_t,
    THRESHOLDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per BLOCK entries of the result."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    positive = tl.zeros([BLOCK], COMPUTE)
    negative = tl.zeros([BLOCK], COMPUTE)
    positive_weight = tl.zeros([BLOCK], COMPUTE)
    negative_weight = tl.zeros([BLOCK], COMPUTE)
    entries = x_ptr + offsets
    for t in range(T):
        value = tl.load(entries, mask=inside, other=0.0).to(COMPUTE)
        entries += stride_t
        if THRESHOLDS:
            value = tl.where(tl.abs(value) < tl.load(thresholds_ptr + t), 0.0, value)
        weighted = value
        weight = tl.full([], 1.0, COMPUTE)
        if WEIGHTS:
            weight = tl.load(weights_ptr + t)
            weighted = value * weight
        # Compared this way round, a NaN enters both sums.
        positive += tl.where(value < 0, 0.0, weighted)
        negative += tl.where(value > 0, 0.0, weighted)
        positive_weight += tl.where(value > 0, weight, 0.0)
        negative_weight += tl.where(value < 0, weight, 0.0)
    wins, loses = positive > -negative, positive < -negative
    numerator = tl.where(wins, positive, negative)
    # Where neither side is heavier the sum is 0, or NaN where an entry is.
    denominator = tl.where(wins, positive_weight, tl.where(loses, negative_weight, 1.0))
    numerator = tl.where(wins | loses, numerator, positive + negative)
    merged = rounded(divided(numerator, denominator), result_ptr.dtype.element_ty, INTERPRETED)
    tl.store(result_ptr + offsets, merged, mask=inside)


def elect_merge(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Launches the merge; x is copied first unless its x[t] are contiguous."""
    x, limits, factors, result = elect_operands(x, thresholds, weights)
    compute = compute_dtype(x)
    launch(
        elect_merge_kernel,
        triton.cdiv(result.numel(), BLOCK),
        x,
        limits,
        factors,
        result,
        x.shape[0],
        result.numel(),
        x.stride(0),
        THRESHOLDS=limits is not None,
        WEIGHTS=factors is not None,
        COMPUTE=DTYPES[compute],
        BLOCK=BLOCK,
        INTERPRETED=INTERPRETED,
        num_warps=8 if compute == torch.float64 else 4,
    )
    return result
