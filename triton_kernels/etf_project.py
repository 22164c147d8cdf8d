"""etf_project: centred rows of the core, scaled, in one read where the rows fit one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import DTYPES, INTERPRETED, divided, launch, rounded

from dirmerge.backends.launch import compute_dtype, flattened

BLOCK_N = 64
# Rows that one program holds in registers: 128 x 64 values over 128 threads are 64 each.
WHOLE_K = 128


@triton.jit
def etf_project_kernel(
    core_ptr,
    result_ptr,
    K,
    n,
    COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program per batch entry and BLOCK_N columns; WHOLE: all K rows are one tile, read once."""
    column_blocks = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // column_blocks).to(tl.int64)
    columns = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows = tl.arange(0, BLOCK_K)[:, None]
    inside = columns < n
    divisor = K.to(COMPUTE)
    scale = divided(divisor, divisor - 1)
    # A second sum, of what is left over the mean, takes away the rounding of the first.
    if WHOLE:
        mask = inside & (rows < K)
        offsets = batch * K * n + rows.to(tl.int64) * n + columns
        tile = tl.load(core_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
        mean = divided(tl.sum(tile, 0, keep_dims=True), divisor)
        mean += divided(tl.sum(tl.where(mask, tile - mean, 0.0), 0, keep_dims=True), divisor)
    else:
        total = tl.zeros([BLOCK_K, BLOCK_N], COMPUTE)
        for start in range(0, K, BLOCK_K):
            mask = inside & (start + rows < K)
            offsets = batch * K * n + (start + rows).to(tl.int64) * n + columns
            total += tl.load(core_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
        mean = tl.sum(total, 0, keep_dims=True) / BLOCK_K
        mean += tl.sum(total - mean, 0, keep_dims=True) / BLOCK_K
        mean = divided(mean * BLOCK_K, divisor)
    if WHOLE:
        value = (tile - mean) * scale
        tl.store(result_ptr + offsets, rounded(value, result_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    else:
        for start in range(0, K, BLOCK_K):
            mask = inside & (start + rows < K)
            offsets = batch * K * n + (start + rows).to(tl.int64) * n + columns
            value = tl.load(core_ptr + offsets, mask=mask, other=0.0).to(COMPUTE)
            value = (value - mean) * scale
            value = rounded(value, result_ptr.dtype.element_ty, INTERPRETED)
            tl.store(result_ptr + offsets, value, mask=mask)


def etf_project(core: torch.Tensor) -> torch.Tensor:
    """Launches K/(K − 1) · (Z − 1 1ᵀ Z / K); core that is not contiguous is copied first."""
    core = core.contiguous()
    result = torch.empty_like(core)
    batch, K, n = flattened(core).shape
    whole = K <= WHOLE_K
    launch(
        etf_project_kernel,
        batch * triton.cdiv(n, BLOCK_N),
        core,
        result,
        K,
        n,
        COMPUTE=DTYPES[compute_dtype(core)],
        WHOLE=whole,
        BLOCK_K=triton.next_power_of_2(K) if whole else 64,
        BLOCK_N=BLOCK_N,
        INTERPRETED=INTERPRETED,
        num_warps=4,
    )
    return result
