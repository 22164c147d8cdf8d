"""Whitened: TSV-M's decorrelation with an exponent of its own on each side and a ridge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dirmerge.linalg import SVDMethod
from dirmerge.methods.registry import register
from dirmerge.methods.scale import Scale
from dirmerge.methods.spectral import (
    Cover,
    Smoothing,
    balanced,
    between,
    check_smoothing,
    cover_space,
    default_smoothing,
    empty_result,
    factor_tasks,
)
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Rank, Tasks, Tolerance, kept_ranks
from dirmerge.ops import gram

Exponent = Annotated[float, Field(ge=0, le=4)]


def _check(options: Mapping[str, Any], adapters: bool) -> None:
    check_smoothing("whitened", options, adapters)


@register(
    "task singular vectors whitened by chosen exponents, with a ridge (this project's)",
    scale=Scale(alignment=1.2, at_tasks=8, power=0.0, limit=1.2),
    adapter_scale=Scale(alignment=0.75, at_tasks=8, limit=1.2),
    check=_check,
    leaves_factors=True,
)
def whitened(
    tasks: Tasks,
    weights: list[float],
    *,
    left_exponent: Exponent = 2.0,
    right_exponent: Exponent = 1.5,
    ridge: Annotated[float, Field(ge=0)] = 0.03,
    smoothing: Smoothing | None = None,
    rho: Annotated[float, Field(ge=1)] = 5.0,
    rank: Rank | None = None,
    svd: SVDMethod = "auto",
    svd_tolerance: Tolerance = 1e-2,
    seed: int = 0,
) -> MergedDelta:
    """Computes D = (U Uᵀ + εI)^(−a/2) U diag(w S) Vᵀ (V Vᵀ + εI)^(−b/2), powers on the spans of U and V.

    U = [U_1 … U_T], V = [V_1 … V_T], S all kept singular values. With G = UᵀU the left side is
    U (G + εI)^(−a/2), so only K × K matrices are decomposed. a = b = 0 is the sum of the truncated tasks,
    a = b = 1 with ε = 0 is TSV-M, a = b = 2 with ε = 0 the dual basis, which reproduces every task's own
    core. Above 1, directions that several tasks share come out below the others.

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0 of the singular values.
        left_exponent: a, on the left (output) side.
        right_exponent: b, on the right (input) side.
        ridge: ε, relative to the Gram matrix of orthonormal bases, whose eigenvalues lie between 0 and T.
        smoothing: DC-Merge's balancing of each task's singular values, their sum kept: "none" (default for
            dense deltas), "average" (default for adapters: all equal) or "linear".
        rho: ρ of the linear smoothing.
        rank: directions kept per task; default ⌊min(m, n) / T⌋, an adapter's own rank, and ⌊min(m, n) / 2T⌋
            at most where adapters are balanced: equal weights on directions that nearly fill the space cost
            4 points with eight adapters of rank 64 in 384 dimensions, 1 with sixteen of rank 16.
        svd: method of the SVDs, see `svd_truncated`.
        svd_tolerance: tolerance of a randomized SVD, see `svd_truncated`.
        seed: seed of the randomized SVD.

    Returns:
        MergedDelta, factored with rank Σ r_t.

    Accuracy:
        The Gram matrices are formed and decomposed in float64. Without a ridge, directions that the stacked
        bases do not span stay zero.

    Source:
        this project; TSV-M: Gargiulo et al., Task Singular Vectors, CVPR 2025.
    """
    smoothing = smoothing or default_smoothing(tasks.low_rank)
    options = {
        "left_exponent": left_exponent,
        "right_exponent": right_exponent,
        "ridge": ridge,
        "smoothing": smoothing,
        **({"rho": rho} if smoothing == "linear" else {}),
        "rank": rank,
        "svd": svd,
        "svd_tolerance": svd_tolerance,
    }
    record = MergeRecord("whitened", options, tasks.shape)
    ranks = kept_ranks(tasks, rank)
    if rank is None and tasks.low_rank and smoothing != "none":
        ranks = [min(r, max(1, min(tasks.shape) // (2 * len(tasks)))) for r in ranks]
    factors = factor_tasks(tasks, ranks, svd, svd_tolerance, seed)
    record.ranks, record.energy, record.notes = factors.ranks, factors.energy, list(factors.notes)
    if sum(factors.ranks) == 0:
        return empty_result(tasks, record, factors)
    sides = []
    for bases, exponent, side in (
        (factors.u, left_exponent, "left"),
        (factors.v, right_exponent, "right"),
    ):
        is_polar = exponent == 1 and ridge == 0
        sides.append(cover_space(bases, svd, side, record) if is_polar else _whiten(bases, exponent, ridge))
    left, right = sides
    record.rank = sum(factors.ranks)
    s = torch.cat([balanced(x, smoothing, rho) * w for x, w in zip(factors.s, weights, strict=True)])
    return MergedDelta(between(left, s, right), record, factors)


def _whiten(bases: Tensor, exponent: float, ridge: float) -> Cover:
    """U (UᵀU + εI)^(−a/2) as a product that is not multiplied out."""
    values, vectors = torch.linalg.eigh(gram(bases.double()))
    # What rounding makes of an eigenvalue 0: that of the bases, squared, and that of the Gram matrix.
    rounding = max(torch.finfo(bases.dtype).eps ** 2 * bases.shape[0], 1e-15 * bases.shape[1])
    powers = torch.where(
        values > rounding * values[-1], (values.clamp(min=0) + ridge) ** (-exponent / 2), 0.0
    )
    core = (vectors * powers) @ vectors.mT
    return Cover(bases, core.to(bases.dtype), core)
