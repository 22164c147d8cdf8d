"""polar_step: X (aI + bG + cG²) with G = XᵀX; the tiles of G² are formed once and never stored."""

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
from dirmerge.triton_kernels.gram import gram, gram_tile, upper_tile

from dirmerge.backends.launch import flattened

POLYNOMIAL = {"BLOCK_N": 64, "BLOCK_M": 32, "num_warps": 8, "num_stages": 3}
LARGE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
# For float32, whose three TF32 products need twice the registers.
MEDIUM = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
# For rows that are not aligned, whose elements are addressed one by one.
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def polynomial_kernel(
    gram_ptr,
    planes_ptr,
    k,
    tiles,
    plane_size,
    a,
    b,
    c,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """P = aI + bG + cG² on the tiles of the upper triangle, stored twice; SPLIT: as a sum of two bfloat16."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = upper_tile(tl.program_id(0) % tiles)
    rows, columns = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_N + tl.arange(0, BLOCK_N)
    gram_ptr += batch * k * k
    # G is symmetric, so its square is its own Gram matrix.
    square = gram_tile(gram_ptr, k, k, k, 1, rows, columns, BLOCK_N, BLOCK_M, PRECISION, INTERPRETED)
    mask = (rows < k)[:, None] & (columns < k)[None, :]
    upper = rows.to(tl.int64)[:, None] * k + columns[None, :]
    lower = columns.to(tl.int64)[:, None] * k + rows[None, :]
    value = c * square + b * tl.load(gram_ptr + upper, mask=mask, other=0.0)
    value += tl.where(rows[:, None] == columns[None, :], a, 0.0)
    planes_ptr += batch * k * k
    if SPLIT:
        leading = rounded(value, tl.bfloat16, INTERPRETED)
        rest = rounded(value - leading.to(tl.float32), tl.bfloat16, INTERPRETED)
        tl.store(planes_ptr + upper, leading, mask=mask)
        tl.store(planes_ptr + lower, tl.trans(leading), mask=tl.trans(mask))
        tl.store(planes_ptr + plane_size + upper, rest, mask=mask)
        tl.store(planes_ptr + plane_size + lower, tl.trans(rest), mask=tl.trans(mask))
    else:
        tl.store(planes_ptr + upper, value, mask=mask)
        tl.store(planes_ptr + lower, tl.trans(value), mask=tl.trans(mask))


@triton.jit
def apply_kernel(
    x_ptr,
    planes_ptr,
    result_ptr,
    m,
    k,
    plane_size,
    stride_batch,
    stride_m,
    stride_k,
    SPLIT: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per batch entry and tile of X P."""
    column_blocks = tl.cdiv(k, BLOCK_N)
    blocks = tl.cdiv(m, BLOCK_M) * column_blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    rows = (block // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (block % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K).to(tl.int64)
    left = x_ptr + batch * stride_batch + rows[:, None] * stride_m + steps[None, :] * stride_k
    right = planes_ptr + batch * k * k + steps[:, None] * k + columns[None, :]
    rows_inside, columns_inside = (rows < m)[:, None], (columns < k)[None, :]
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = steps < k - start
        x = tl.load(left, mask=rows_inside & inside[None, :], other=0.0)
        x = operand(x, INTERPRETED)
        mask = columns_inside & inside[:, None]
        if SPLIT:
            rest = tl.load(right + plane_size, mask=mask, other=0.0)
            value = tl.dot(x, operand(rest, INTERPRETED), value)
        leading = tl.load(right, mask=mask, other=0.0)
        value = tl.dot(x, operand(leading, INTERPRETED), value, input_precision=PRECISION)
        left += BLOCK_K * stride_k
        right += BLOCK_K * k
    result = result_ptr + (batch * m + rows)[:, None] * k + columns[None, :]
    tl.store(result, rounded(value, OUT, INTERPRETED), mask=rows_inside & columns_inside)


def polar_step(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """Launches Gram matrix, polynomial and product; wide matrices are transposed, float16 runs as float32.

    Nothing is read from the device or copied from the host, and memory comes from torch's pools: once a call
    has compiled the kernels, a loop of steps can be captured as a CUDA graph (tests/gpu/test_triton.py).
    """
    if x.shape[-2] < x.shape[-1]:
        return polar_step(x.mT, a, b, c).mT.contiguous()
    if x.dtype == torch.float16:
        # The polynomial's entries can exceed what float16 holds.
        return polar_step(x.float(), a, b, c).half()
    result = x.new_empty(x.shape)
    batched = flattened(x)
    batch, m, k = batched.shape
    split = x.dtype == torch.bfloat16
    planes = x.new_empty((2 if split else 1, batch, k, k))
    blocks = triton.cdiv(k, POLYNOMIAL["BLOCK_N"])
    count = blocks * (blocks + 1) // 2
    tiles = LARGE if split else MEDIUM
    if not aligned(batched, planes):
        tiles = SMALL
    precision = float32_products()
    launch(
        polynomial_kernel,
        batch * count,
        gram(batched),
        planes,
        k,
        count,
        batch * k * k,
        a,
        b,
        c,
        SPLIT=split,
        PRECISION=precision,
        INTERPRETED=INTERPRETED,
        **POLYNOMIAL,
    )
    launch(
        apply_kernel,
        batch * triton.cdiv(m, tiles["BLOCK_M"]) * triton.cdiv(k, tiles["BLOCK_N"]),
        batched,
        planes,
        result,
        m,
        k,
        batch * k * k,
        *batched.stride(),
        SPLIT=split,
        OUT=DTYPES[x.dtype],
        PRECISION=precision,
        INTERPRETED=INTERPRETED,
        **tiles,
    )
    return result
