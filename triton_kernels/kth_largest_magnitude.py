"""kth_largest_magnitude: radix selection on the bits of the numbers, two passes for 16-bit, three for 32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import INTERPRETED, launch

from dirmerge.backends.launch import by_task

# Without its sign bit a float orders as an integer does, NaN above infinity. Digits from the top.
DIGITS = {2: (8, 7), 4: (11, 10, 10), 8: (11, 11, 11, 10, 10, 10)}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 2048
# Enough programs to fill any current GPU, few enough that the histograms they add up stay a small cost.
PROGRAMS = 1024


@triton.jit
def histogram_kernel(
    bits_ptr,
    prefix_ptr,
    counts_ptr,
    size,
    stride_t,
    programs,
    MAGNITUDE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the next digit of the entries whose higher digits are those chosen so far."""
    t = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * BLOCK
    prefix = tl.load(prefix_ptr + t)
    digits = tl.arange(0, 1 << BITS)
    counts = tl.zeros([1 << BITS], tl.int32)
    for start in range(first, size, programs * BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < size
        bits = tl.load(bits_ptr + t * stride_t + offsets, mask=inside, other=0) & MAGNITUDE
        if MAGNITUDE <= 0x7FFFFFFF:
            bits = bits.to(tl.int32)
        candidate = inside & ((bits >> (SHIFT + BITS)) == prefix.to(bits.dtype))
        digit = ((bits >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counts += tl.histogram(digit, 1 << BITS, mask=candidate)
    tl.atomic_add(counts_ptr + (t << BITS) + digits, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def select_kernel(counts_ptr, prefix_ptr, remaining_ptr, result_ptr, BITS: tl.constexpr, LAST: tl.constexpr):
    """Chooses the digit in which the k-th largest lies, and how many of that digit's entries to go down."""
    t = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, 1 << BITS)
    counts = tl.load(counts_ptr + (t << BITS) + digits)
    remaining = tl.load(remaining_ptr + t)
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= remaining).to(tl.int64), 0) - 1
    above = tl.sum(tl.where(digits > digit, counts, 0), 0)
    prefix = (tl.load(prefix_ptr + t) << BITS) | digit
    tl.store(prefix_ptr + t, prefix)
    tl.store(remaining_ptr + t, remaining - above)
    if LAST:
        tl.store(result_ptr + t, prefix.to(result_ptr.dtype.element_ty))


def kth_largest_magnitude(x: torch.Tensor, k: int) -> torch.Tensor:
    """Launches the selection; x[t] that is not contiguous is copied first."""
    T = x.shape[0]
    result = x.new_empty(T)
    if T == 0:
        return result
    x = by_task(x)
    width = x.element_size()
    bits = x.view(INTEGERS[width])
    size = x[0].numel()
    prefix = torch.zeros(T, dtype=torch.int64, device=x.device)
    remaining = torch.full((T,), k, dtype=torch.int64, device=x.device)
    programs = min(triton.cdiv(size, BLOCK), max(1, PROGRAMS // T), 2 if INTERPRETED else PROGRAMS)
    shift = 8 * width - 1
    for digit_bits in DIGITS[width]:
        shift -= digit_bits
        counts = torch.zeros((T, 1 << digit_bits), dtype=torch.int64, device=x.device)
        launch(
            histogram_kernel,
            T * programs,
            bits,
            prefix,
            counts,
            size,
            x.stride(0),
            programs,
            MAGNITUDE=(1 << (8 * width - 1)) - 1,
            SHIFT=shift,
            BITS=digit_bits,
            BLOCK=BLOCK,
            num_warps=8,
        )
        launch(
            select_kernel,
            T,
            counts,
            prefix,
            remaining,
            result.view(INTEGERS[width]),
            BITS=digit_bits,
            LAST=shift == 0,
            num_warps=4,
        )
    return result
