"""MDA, parameter space: the shared subspace of the tasks, projected onto a simplex ETF."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from dirmerge.deltas.lowrank import LowRank
from dirmerge.linalg import SVDMethod
from dirmerge.methods.registry import register
from dirmerge.methods.scale import ADAPTER_ALIGNMENT, FULL_ALIGNMENT
from dirmerge.methods.spectral import between, cover_space, empty_result, factor_tasks
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Rank, Tasks, Tolerance
from dirmerge.ops import etf_project


@register(
    "shared subspace projected onto a simplex ETF (parameter space, data-free)",
    scale=FULL_ALIGNMENT,
    adapter_scale=ADAPTER_ALIGNMENT,
    leaves_factors=True,
)
def mda(
    tasks: Tasks,
    weights: list[float],
    *,
    rank: Rank | None = None,
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None,
    frame: Literal["shared", "blocks", "canonical", "random"] = "shared",
    svd: SVDMethod = "auto",
    svd_tolerance: Tolerance = 1e-2,
    seed: int = 0,
) -> MergedDelta:
    """Computes D = M Mᵀ Q blkdiag(w_t S_t) Rᵀ with M a simplex ETF.

    Q and R are the polar factors of the stacked bases;
    M = √(K/(K−1)) F (I − 11ᵀ/K) on a frame F. On the shared frame F = Q the Gram operator acts on the small
    core alone (`etf_project`); G = M Mᵀ is never formed for any frame. It takes out the one direction Q 1: a
    singular vector's sign matters, so each is turned until its largest left entry is positive.

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0 of the singular values.
        rank: directions kept per task, in place of `fraction`.
        fraction: directions kept per task as a fraction of m; default 1/T, an adapter's own rank. Both are
            capped at min(m, n) and ⌊m/T⌋, above which the frame has no room.
        frame: "shared" (Q), "blocks" (Q with one vertex per task: the T row blocks of the core are centred
            across tasks; needs equal ranks), "canonical" (I_m) or "random" (Haar, K columns, by `seed`). The
            published text does not fix it.
        svd: method of the SVDs, see `svd_truncated`.
        svd_tolerance: tolerance of a randomized SVD, see `svd_truncated`.
        seed: seed of the randomized SVD and of the random frame.

    Returns:
        MergedDelta, factored with rank Σ r_t.

    Source:
        MDA, arXiv 2512.00391, parameter-space alignment ("MDA TA").
    """
    options = {"rank": rank, "fraction": fraction, "frame": frame, "svd": svd, "svd_tolerance": svd_tolerance}
    if rank is not None and fraction is not None:
        raise ValueError("mda: rank and fraction both set the number of directions; give one of them")
    record = MergeRecord("mda", options, tasks.shape)
    m, n = tasks.shape
    cap = max(1, min(m, n, m // len(tasks)))
    share = rank if rank is not None else max(1, math.floor((fraction or 1 / len(tasks)) * m + 1e-9))
    own = rank is None and fraction is None
    ranks = [min(cap, r if own and r is not None else min(share, r or share)) for r in tasks.ranks]
    factors = factor_tasks(tasks, ranks, svd, svd_tolerance, seed)
    record.ranks, record.energy, record.notes = factors.ranks, factors.energy, list(factors.notes)
    k = sum(factors.ranks)
    if k == 0:
        return empty_result(tasks, record, factors)
    left = cover_space(factors.u, svd, "left", record)
    right = cover_space(factors.v, svd, "right", record)
    # The shared frame loses the direction Q 1, which depends on the signs that an SVD leaves open: fix them.
    signs = column_signs(factors.u)
    s = factors.weighted(weights)
    record.rank = k
    if (k if frame == "shared" else min(m, k)) < 2:
        record.notes.append("a simplex ETF needs two vertices; the shared subspace is returned as it is")
        return MergedDelta(between(left, s, right), record, factors)
    if frame == "shared":
        core = etf_project(torch.diag(s)) * signs * signs.unsqueeze(1)
        merged = between(left, core, right)
    elif frame == "blocks":
        count = len(factors.ranks)
        if len(set(factors.ranks)) > 1:
            raise ValueError(
                f"mda: frame='blocks' needs equal ranks, got {factors.ranks}: set rank, or use another frame"
            )
        core = torch.diag(s)
        if count > 1:
            core = etf_project(core.view(count, -1)).view(k, k)
        merged = between(left, core * signs * signs.unsqueeze(1), right)
    elif frame == "canonical":
        merged = LowRank(etf_project(left.frame() * s), None, right.frame())
    else:
        merged = LowRank(_random_frame(left.frame() * s, min(k, m), seed), None, right.frame())
    return MergedDelta(merged, record, factors)


def column_signs(u: torch.Tensor) -> torch.Tensor:
    """(r,) the sign of each column's largest entry, so that a singular vector has one orientation."""
    return u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0).sign()


def _random_frame(left: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """Applies M Mᵀ of a Haar-random frame F (m, k) to left: F etf_project(Fᵀ left)."""
    generator = torch.Generator().manual_seed(seed)
    # Made on the CPU, so that a seed means the same frame on every device.
    gaussian = torch.randn(left.shape[0], k, generator=generator, dtype=left.dtype)
    if left.is_cuda:
        gaussian = gaussian.pin_memory().to(left.device, non_blocking=True)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    projected: torch.Tensor = q @ etf_project(q.mT @ left)
    return projected
