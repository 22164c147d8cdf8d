"""etf_project_add: qᵀD by slices of rows, then base + α (D − q (qᵀD) / K) in one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import DTYPES, INTERPRETED, rounded

BLOCK_M, BLOCK_N = 32, 128
# Slices of rows whose products with q are summed apart, so that matrices with few columns fill the device
# too; added up in a fixed order, without atomics.
SLICES = 16


@triton.jit
def column_product_kernel(
    update_ptr,
    frame_sum_ptr,
    partial_ptr,
    m,
    n,
    rows_per_slice,
    stride_update_m,
    stride_update_n,
    stride_frame_sum,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per slice of rows and BLOCK_N columns: the slice's part of qᵀD."""
    column_blocks = tl.cdiv(n, BLOCK_N)
    part = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * rows_per_slice
    last = tl.minimum(first + rows_per_slice, m)
    inside = columns < n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows_per_slice, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        tile = update_ptr + rows[:, None] * stride_update_m + columns[None, :] * stride_update_n
        mask = (rows < last)[:, None] & inside[None, :]
        q = tl.load(frame_sum_ptr + rows * stride_frame_sum, mask=rows < last, other=0.0).to(tl.float32)
        total += q[:, None] * tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + part * n + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def rank_one_add_kernel(
    base_ptr,
    update_ptr,
    frame_sum_ptr,
    partial_ptr,
    result_ptr,
    m,
    n,
    slices,
    inverse_K,
    factor,
    stride_base_m,
    stride_base_n,
    stride_update_m,
    stride_update_n,
    stride_frame_sum,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per tile of the result; the slices' parts of qᵀD are added up on the way."""
    column_blocks = tl.cdiv(n, BLOCK_N)
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_inside, columns_inside = rows < m, columns < n
    product = tl.zeros([BLOCK_N], tl.float32)
    for part in range(slices):
        product += tl.load(partial_ptr + part * n + columns, mask=columns_inside, other=0.0)
    q = tl.load(frame_sum_ptr + rows * stride_frame_sum, mask=rows_inside, other=0.0).to(tl.float32)
    mask = rows_inside[:, None] & columns_inside[None, :]
    update = update_ptr + rows[:, None] * stride_update_m + columns[None, :] * stride_update_n
    base = base_ptr + rows[:, None] * stride_base_m + columns[None, :] * stride_base_n
    value = tl.load(update, mask=mask, other=0.0).to(tl.float32) - q[:, None] * (product * inverse_K)[None, :]
    value = tl.load(base, mask=mask, other=0.0).to(tl.float32) + factor * value
    tl.store(result_ptr + rows[:, None] * n + columns[None, :], rounded(value, OUT, INTERPRETED), mask=mask)


def etf_project_add(
    base: torch.Tensor,
    update: torch.Tensor,
    frame_sum: torch.Tensor,
    K: int,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Launches both kernels; any strides. A float64 update or frame sum becomes float32 first."""
    m, n = base.shape
    result = base.new_empty((m, n), dtype=out_dtype or base.dtype)
    if result.numel() == 0:
        return result
    update = update.float() if update.dtype == torch.float64 else update
    frame_sum = frame_sum.float() if frame_sum.dtype == torch.float64 else frame_sum
    row_blocks, column_blocks = triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N)
    rows_per_slice = triton.cdiv(row_blocks, SLICES) * BLOCK_M
    slices = triton.cdiv(m, rows_per_slice)
    partial = base.new_empty((slices, n), dtype=torch.float32)
    with torch.cuda.device_of(base):
        column_product_kernel[(slices * column_blocks,)](
            update,
            frame_sum,
            partial,
            m,
            n,
            rows_per_slice,
            *update.stride(),
            *frame_sum.stride(),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=8,
        )
        rank_one_add_kernel[(row_blocks * column_blocks,)](
            base,
            update,
            frame_sum,
            partial,
            result,
            m,
            n,
            slices,
            1 / K,
            scale * K / (K - 1),
            *base.stride(),
            *update.stride(),
            *frame_sum.stride(),
            OUT=DTYPES[result.dtype],
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            INTERPRETED=INTERPRETED,
            num_warps=8,
        )
    return result
