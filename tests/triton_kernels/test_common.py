from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import rounded
from dirmerge.triton_kernels.gram import upper_tile


@triton.jit
def round_kernel(x_ptr, result_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = rounded(tl.load(x_ptr + offsets), result_ptr.dtype.element_ty, True)
    tl.store(result_ptr + offsets, value)


@triton.jit
def tile_kernel(tiles_ptr, rows_ptr, columns_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    i, j = upper_tile(tl.load(tiles_ptr + offsets))
    tl.store(rows_ptr + offsets, i)
    tl.store(columns_ptr + offsets, j)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    exponents = torch.tensor([0, 1, 2, 100, 127, 200, 253, 254])[:, None] << 23
    ends = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF])
    bits = (exponents + ends).flatten()
    special = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x80000000 - 1, 0, 1, 0x8000])
    bits = torch.cat([bits, special, bits | 1 << 31, special | 1 << 31])
    x = torch.zeros(256, dtype=torch.int32)
    x[: len(bits)] = bits.to(torch.int64).sub((bits >> 31) << 32).to(torch.int32)
    x = x.view(torch.float32)
    found = torch.empty(256, dtype=torch.bfloat16)
    round_kernel[(1,)](x, found, BLOCK=256)
    assert torch.equal(found.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(found[numbers].view(torch.int16), x[numbers].bfloat16().view(torch.int16))


def test_tiles_of_the_upper_triangle_are_numbered_column_by_column() -> None:
    first = [(i, j) for j in range(22) for i in range(j + 1)]
    last = [(i, j) for j in (4095, 4096, 30000, 32766) for i in (0, j)]
    pairs = torch.tensor(first[: 256 - len(last)] + last)
    i, j = pairs.T
    tiles = (j * (j + 1) // 2 + i).to(torch.int32)
    rows, columns = torch.empty(256, dtype=torch.int32), torch.empty(256, dtype=torch.int32)
    tile_kernel[(1,)](tiles, rows, columns, BLOCK=256)
    assert torch.equal(rows.long(), i)
    assert torch.equal(columns.long(), j)
