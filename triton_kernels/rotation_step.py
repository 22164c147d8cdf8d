"""rotation_step: one fused kernel from RᵀΓ to the scaled I − η skew(RᵀΓ), then polar steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dirmerge.triton_kernels._common import launch
from dirmerge.triton_kernels.gram import gram
from dirmerge.triton_kernels.polar_step import polar_step

BLOCK = 32


@triton.jit
def skew_step_kernel(product_ptr, scale_ptr, result_ptr, d, half_rate, BLOCK: tl.constexpr):
    """One program per batch entry and tile: scale · (I − half_rate (A − Aᵀ))."""
    blocks = tl.cdiv(d, BLOCK)
    batch = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    tile = tl.program_id(0) % (blocks * blocks)
    rows = (tile // blocks) * BLOCK + tl.arange(0, BLOCK)
    columns = (tile % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = (rows < d)[:, None] & (columns < d)[None, :]
    product_ptr += batch * d * d
    offsets = rows.to(tl.int64)[:, None] * d + columns[None, :]
    mirrored = columns.to(tl.int64)[:, None] * d + rows[None, :]
    skew = tl.load(product_ptr + offsets, mask=mask, other=0.0)
    # Read along its rows and turned in registers, so that both reads are of neighbouring addresses.
    skew -= tl.trans(tl.load(product_ptr + mirrored, mask=tl.trans(mask), other=0.0))
    identity = tl.where(rows[:, None] == columns[None, :], 1.0, 0.0)
    value = tl.load(scale_ptr + batch) * (identity - half_rate * skew)
    tl.store(result_ptr + batch * d * d + offsets, value, mask=mask)


def rotation_step(
    rotation: torch.Tensor, gradient: torch.Tensor, *, rate: float, steps: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the step; the two plain products are torch's."""
    d = rotation.shape[-1]
    product = torch.matmul(rotation.mT, gradient.to(rotation.dtype)).contiguous()
    bound = torch.minimum(
        (torch.linalg.matrix_norm(product, 1) + torch.linalg.matrix_norm(product, torch.inf)) / 2,
        torch.linalg.matrix_norm(product) / 2**0.5,
    )
    scale = (1 + (rate * bound).square()).rsqrt().contiguous()
    factor = torch.empty_like(product)
    programs = scale.numel() * triton.cdiv(d, BLOCK) ** 2
    launch(skew_step_kernel, programs, product, scale, factor, d, 0.5 * rate, BLOCK=BLOCK, num_warps=4)
    stepped = torch.matmul(rotation, factor)
    for _ in range(steps):
        stepped = polar_step(stepped, 15 / 8, -10 / 8, 3 / 8)
    deviation = gram(stepped)
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1)
    return stepped, torch.linalg.matrix_norm(deviation) / d**0.5
