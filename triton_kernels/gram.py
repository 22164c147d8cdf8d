"""gram: XᵀX on the tiles of the upper triangle, each stored twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import INTERPRETED, aligned, float32_products, launch, operand

from dirmerge.backends.launch import gram_operands

LARGE = {"BLOCK_N": 128, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
# For float32, whose three TF32 products need twice the registers, and for rows that are not aligned, whose
# elements are addressed one by one.
SMALL = {"BLOCK_N": 64, "BLOCK_M": 32, "num_warps": 4, "num_stages": 3}


def tiles(x: torch.Tensor) -> dict[str, int]:
    """The block sizes and launch options for an operand."""
    return LARGE if x.element_size() == 2 and aligned(x) else SMALL


@triton.jit
def upper_tile(tile):
    """The tile (i, j), i <= j, with number tile = j (j + 1) / 2 + i."""
    j = tl.floor((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The float32 root can be off by one for large numbers.
    j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
    return tile - j * (j + 1) // 2, j


@triton.jit
def gram_tile(
    x_ptr,
    m,
    n,
    stride_m,
    stride_n,
    rows,
    columns,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """X[:, rows]ᵀ X[:, columns] in float32."""
    steps = tl.arange(0, BLOCK_M).to(tl.int64)
    left = x_ptr + rows.to(tl.int64)[:, None] * stride_n + steps[None, :] * stride_m
    right = x_ptr + steps[:, None] * stride_m + columns.to(tl.int64)[None, :] * stride_n
    rows_inside, columns_inside = (rows < n)[:, None], (columns < n)[None, :]
    product = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for start in range(0, m, BLOCK_M):
        inside = steps < m - start
        a = tl.load(left, mask=rows_inside & inside[None, :], other=0.0)
        b = tl.load(right, mask=columns_inside & inside[:, None], other=0.0)
        product = tl.dot(operand(a, INTERPRETED), operand(b, INTERPRETED), product, input_precision=PRECISION)
        left += BLOCK_M * stride_m
        right += BLOCK_M * stride_m
    return product


@triton.jit
def gram_kernel(
    x_ptr,
    result_ptr,
    m,
    n,
    tiles,
    stride_batch,
    stride_m,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per batch entry and tile of the upper triangle."""
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = upper_tile(tl.program_id(0) % tiles)
    rows, columns = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += batch * stride_batch
    product = gram_tile(
        x_ptr, m, n, stride_m, stride_n, rows, columns, BLOCK_N, BLOCK_M, PRECISION, INTERPRETED
    )
    result_ptr += batch * n * n
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(result_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :], product, mask=inside)
    tl.store(
        result_ptr + columns.to(tl.int64)[:, None] * n + rows[None, :],
        tl.trans(product),
        mask=tl.trans(inside),
    )


def gram(x: torch.Tensor) -> torch.Tensor:
    """Launches XᵀX; leading dimensions that cannot be flattened into one stride are copied first."""
    batched, result = gram_operands(x)
    batch, m, n = batched.shape
    options = tiles(batched)
    blocks = triton.cdiv(n, options["BLOCK_N"])
    count = blocks * (blocks + 1) // 2
    launch(
        gram_kernel,
        batch * count,
        batched,
        result,
        m,
        n,
        count,
        *batched.stride(),
        PRECISION=float32_products(),
        INTERPRETED=INTERPRETED,
        **options,
    )
    return result
