"""lowrank_add: base + scale · left rightᵀ, accumulated in float32, base read once, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import (
    DTYPES,
    INTERPRETED,
    aligned,
    float32_products,
    launch,
    operand,
    rounded,
)

LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
# For float32 factors, whose three TF32 products need twice the registers.
MEDIUM = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
# For rows that are not aligned, whose elements are addressed one by one.
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def lowrank_add_kernel(
    base_ptr,
    left_ptr,
    right_ptr,
    result_ptr,
    m,
    n,
    k,
    stride_base_m,
    stride_base_n,
    stride_left_m,
    stride_left_k,
    stride_right_n,
    stride_right_k,
    scale,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per tile of the result."""
    column_blocks = tl.cdiv(n, BLOCK_N)
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K).to(tl.int64)
    left = left_ptr + rows[:, None] * stride_left_m + steps[None, :] * stride_left_k
    right = right_ptr + steps[:, None] * stride_right_k + columns[None, :] * stride_right_n
    rows_inside, columns_inside = (rows < m)[:, None], (columns < n)[None, :]
    update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = steps < k - start
        a = tl.load(left, mask=rows_inside & inside[None, :], other=0.0)
        b = tl.load(right, mask=columns_inside & inside[:, None], other=0.0)
        update = tl.dot(operand(a, INTERPRETED), operand(b, INTERPRETED), update, input_precision=PRECISION)
        left += BLOCK_K * stride_left_k
        right += BLOCK_K * stride_right_k
    base_tile = base_ptr + rows[:, None] * stride_base_m + columns[None, :] * stride_base_n
    mask = rows_inside & columns_inside
    value = tl.load(base_tile, mask=mask, other=0.0).to(tl.float32) + scale * update
    tl.store(result_ptr + rows[:, None] * n + columns[None, :], rounded(value, OUT, INTERPRETED), mask=mask)


def lowrank_add(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Launches the update; any strides. Factors of two dtypes, or float64, become float32 first."""
    m, n = base.shape
    result = base.new_empty((m, n), dtype=out_dtype or base.dtype)
    if left.dtype != right.dtype or left.dtype == torch.float64:
        left, right = left.float(), right.float()
    tiles = LARGE if left.element_size() == 2 else MEDIUM
    if not aligned(base, left, right):
        tiles = SMALL
    launch(
        lowrank_add_kernel,
        triton.cdiv(m, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"]),
        base,
        left,
        right,
        result,
        m,
        n,
        left.shape[1],
        *base.stride(),
        *left.stride(),
        *right.stride(),
        scale,
        OUT=DTYPES[result.dtype],
        PRECISION=float32_products(),
        INTERPRETED=INTERPRETED,
        **tiles,
    )
    return result
