"""elect_merge: threshold, sign election and disjoint mean over the tasks, one read and one write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import DTYPES, INTERPRETED, compute_dtype, divided, on_device, rounded

BLOCK = 1024


@triton.jit
def elect_merge_kernel(
    x_ptr,
    thresholds_ptr,
    weights_ptr,
    bounds_ptr,
    result_ptr,
    T,
    columns,
    stride_t,
    stride_row,
    THRESHOLDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per row and BLOCK columns; BLOCKS: only columns from bounds[row, 0] to bounds[row, 1]."""
    column_blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    offsets = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    kept_columns = inside
    if BLOCKS:
        first = tl.load(bounds_ptr + 2 * row)
        last = tl.load(bounds_ptr + 2 * row + 1)
        kept_columns = inside & (offsets >= first) & (offsets < last)
    positive = tl.zeros([BLOCK], COMPUTE)
    negative = tl.zeros([BLOCK], COMPUTE)
    positive_weight = tl.zeros([BLOCK], COMPUTE)
    negative_weight = tl.zeros([BLOCK], COMPUTE)
    entries = x_ptr + row * stride_row + offsets
    for t in range(T):
        value = tl.load(entries, mask=kept_columns, other=0.0).to(COMPUTE)
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
    tl.store(result_ptr + row * columns + offsets, merged, mask=inside)


def elect_merge(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
    blocks: Sequence[int] | None = None,
) -> torch.Tensor:
    """Launches the merge; x is copied first unless its x[t], or with blocks its rows, are contiguous."""
    T = x.shape[0]
    result = x.new_empty(x.shape[1:])
    if result.numel() == 0:
        return result
    compute = compute_dtype(x)
    if blocks is None:
        if not x[0].is_contiguous():
            x = x.contiguous()
        rows, columns, stride_row = 1, result.numel(), 0
    else:
        if x.stride(2) != 1:
            x = x.contiguous()
        rows, columns, stride_row = x.shape[1], x.shape[2], x.stride(1)
    bounds = None
    if blocks is not None:
        ends = [sum(blocks[: b + 1]) for b in range(len(blocks))]
        pairs = [(end - size, end) for size, end in zip(blocks, ends, strict=True) for _ in range(size)]
        bounds = on_device([bound for pair in pairs for bound in pair], torch.int64, x.device)
    with torch.cuda.device_of(x):
        elect_merge_kernel[(rows * triton.cdiv(columns, BLOCK),)](
            x,
            None if thresholds is None else thresholds.to(compute).contiguous(),
            None if weights is None else on_device(weights, compute, x.device),
            bounds,
            result,
            T,
            columns,
            x.stride(0),
            stride_row,
            THRESHOLDS=thresholds is not None,
            WEIGHTS=weights is not None,
            BLOCKS=blocks is not None,
            COMPUTE=DTYPES[compute],
            BLOCK=BLOCK,
            INTERPRETED=INTERPRETED,
            num_warps=8 if compute == torch.float64 else 4,
        )
    return result
