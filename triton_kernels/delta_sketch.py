"""delta_sketch: (W_t − W_0) Ω for all tasks in one launch; neither the difference nor Ω is ever in memory."""

from __future__ import annotations

from collections.abc import Sequence

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
)

from dirmerge.backends.launch import addresses

TILES = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_S": 128, "num_warps": 8, "num_stages": 3}
# For rows that are not aligned, whose elements are addressed one by one.
SMALL = {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_S": 64, "num_warps": 8, "num_stages": 2}


@triton.jit
def random_signs(seed, rows, first_column, BLOCK_S: tl.constexpr):
    """Ω[rows, first_column + (0 … BLOCK_S − 1)], ±1 in bfloat16: random_signs of dirmerge.ops."""
    counter = rows.to(tl.uint32)
    zero = counter * 0
    group = zero + (first_column // 128).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, counter, group, zero, zero)
    column = (first_column % 128 + tl.arange(0, BLOCK_S))[None, :]
    word = column // 32
    low = tl.where(word == 0, word_0[:, None], word_1[:, None])
    high = tl.where(word == 2, word_2[:, None], word_3[:, None])
    bit = (tl.where(word < 2, low, high) >> (column % 32).to(tl.uint32)) & 1
    return ((bit << 15) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def leading_bfloat16(x):
    """The first eight bits of float32 x, which bfloat16 holds exactly."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["seed"])
def delta_sketch_kernel(
    addresses_ptr,
    base_ptr,
    test_ptr,
    value_ptr,
    energy_ptr,
    nonfinite_ptr,
    T,
    m,
    n,
    width,
    seed,
    stride_m,
    stride_n,
    stride_base_m,
    stride_base_n,
    stride_test_t,
    stride_test_n,
    stride_test_s,
    FINETUNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANDOM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per BLOCK_M rows, task and BLOCK_S columns; in that order, so that neighbours share W_0."""
    column_blocks = tl.cdiv(width, BLOCK_S)
    row_blocks = tl.cdiv(m, BLOCK_M)
    column_block = tl.program_id(0) % column_blocks
    t = (tl.program_id(0) // column_blocks % T).to(tl.int64)
    row_block = tl.program_id(0) // (column_blocks * T)
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_S + tl.arange(0, BLOCK_S)
    steps = tl.arange(0, BLOCK_N).to(tl.int64)
    finetuned = tl.load(addresses_ptr + t).to(tl.pointer_type(FINETUNED))
    if ALIGNED:
        finetuned = tl.multiple_of(finetuned, 16)
    finetuned += rows[:, None] * stride_m + steps[None, :] * stride_n
    base = base_ptr + rows[:, None] * stride_base_m + steps[None, :] * stride_base_n
    rows_inside, columns_inside = (rows < m)[:, None], (columns < width)[None, :]
    if not RANDOM:
        test = test_ptr + t * stride_test_t + steps[:, None] * stride_test_n
        test += columns.to(tl.int64)[None, :] * stride_test_s
    value = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    energy = tl.zeros([BLOCK_M], tl.float64)
    nonfinite = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n, BLOCK_N):
        inside = steps < n - start
        mask = rows_inside & inside[None, :]
        delta = tl.load(finetuned, mask=mask, other=0.0).to(tl.float32)
        delta -= tl.load(base, mask=mask, other=0.0).to(tl.float32)
        if column_block == 0:
            # Squared in float64: the square of a finite float32 can overflow.
            energy += tl.sum(delta.to(tl.float64) * delta.to(tl.float64), 1)
            nonfinite += tl.sum((delta - delta != 0.0).to(tl.int32), 1)
        if RANDOM:
            # The signs are exact in bfloat16 and so are the three pieces of a float32: the cheapest form of
            # its full product.
            first = leading_bfloat16(delta)
            second = leading_bfloat16(delta - first)
            third = delta - first - second
            signs = random_signs(seed, start + steps, column_block * BLOCK_S, BLOCK_S)
            signs = operand(signs, INTERPRETED)
            value = tl.dot(operand(third.to(tl.bfloat16), INTERPRETED), signs, value)
            value = tl.dot(operand(second.to(tl.bfloat16), INTERPRETED), signs, value)
            value = tl.dot(operand(first.to(tl.bfloat16), INTERPRETED), signs, value)
        else:
            right = tl.load(test, mask=inside[:, None] & columns_inside, other=0.0).to(tl.float32)
            value = tl.dot(delta, right, value, input_precision=PRECISION)
        finetuned += BLOCK_N * stride_n
        base += BLOCK_N * stride_base_n
        if not RANDOM:
            test += BLOCK_N * stride_test_n
    result = value_ptr + (t * m + rows)[:, None] * width + columns[None, :]
    tl.store(result, value, mask=rows_inside & columns_inside)
    if column_block == 0:
        tl.store(energy_ptr + t * row_blocks + row_block, tl.sum(energy, 0))
        tl.store(nonfinite_ptr + t * row_blocks + row_block, tl.sum(nonfinite, 0))


def delta_sketch(
    base: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    test: torch.Tensor | None = None,
    *,
    width: int,
    seed: int = 0,
    transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the sketch; any strides, but fine-tuned weights whose strides differ are copied first."""
    T = len(finetuned)
    if len({weight.stride() for weight in finetuned}) > 1:
        finetuned = [weight.contiguous() for weight in finetuned]
    # The sketch of the transposed matrices is that of the same memory with its strides exchanged.
    if transposed:
        base, finetuned = base.mT, [weight.mT for weight in finetuned]
    m, n = base.shape
    value = base.new_empty((T, m, width), dtype=torch.float32)
    test_strides = (0, 0, 0)
    if test is not None:
        test = test.float() if test.dtype == torch.float64 else test
        test_strides = (0 if test.dim() == 2 else test.stride(0), *test.stride()[-2:])
    all_aligned = aligned(base, *finetuned)
    tiles = TILES if all_aligned else SMALL
    row_blocks = triton.cdiv(m, tiles["BLOCK_M"])
    energy = base.new_zeros((T, row_blocks), dtype=torch.float64)
    nonfinite = base.new_zeros((T, row_blocks), dtype=torch.int32)
    if T:
        launch(
            delta_sketch_kernel,
            row_blocks * T * triton.cdiv(width, tiles["BLOCK_S"]),
            addresses(finetuned),
            base,
            test,
            value,
            energy,
            nonfinite,
            T,
            m,
            n,
            width,
            seed,
            *finetuned[0].stride(),
            *base.stride(),
            *test_strides,
            FINETUNED=DTYPES[finetuned[0].dtype],
            ALIGNED=all_aligned,
            RANDOM=test is None,
            PRECISION=float32_products(),
            INTERPRETED=INTERPRETED,
            **tiles,
        )
    return value, energy.sum(1), nonfinite.sum(1)
