"""Iso-C and Iso-CTS: isotropic spectra in common and task-specific subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank
from dirmerge.linalg import SVDMethod, kept_directions, polar, svd_flops, svd_truncated
from dirmerge.methods.registry import Cost, register
from dirmerge.methods.scale import ADAPTER_ALIGNMENT, FULL_ALIGNMENT
from dirmerge.methods.spectral import between, cover_space
from dirmerge.methods.tasks import (
    Delta,
    MergedDelta,
    MergeRecord,
    Rank,
    TaskDelta,
    Tasks,
    Tolerance,
    kept_ranks,
    sum_tasks,
)


def _budget(tasks: Tasks, rank: int | None) -> int:
    """Directions of the result: p for dense deltas, Σ r_t for adapters or a given rank; at most p."""
    p = min(tasks.shape)
    return min(p, sum(kept_ranks(tasks, rank))) if tasks.low_rank or rank is not None else p


@register(
    "sum of the tasks with an isotropic spectrum",
    scale=FULL_ALIGNMENT,
    adapter_scale=ADAPTER_ALIGNMENT,
)
def iso_c(
    tasks: Tasks,
    weights: list[float],
    *,
    rank: Rank | None = None,
    svd: SVDMethod = "auto",
    svd_tolerance: Tolerance = 1e-2,
    seed: int = 0,
) -> MergedDelta:
    """Computes D = σ̄ polar(Σ w_t D_t), σ̄ the mean singular value of the sum.

    The sum of the singular values is ⟨polar(X), X⟩, so dense deltas need no SVD unless a rank is given. Null
    directions of the sum stay zero.

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0.
        rank: directions per task: the T · rank leading directions of the sum are kept; default all (min(m,
            n), or Σ r_t for adapters).
        svd: method of the SVD, see `svd_truncated`; only a given rank needs one. "exact" makes the polar
            factor exact too.
        svd_tolerance: tolerance of a randomized SVD, see `svd_truncated`.
        seed: seed of the randomized SVD.

    Returns:
        MergedDelta, factored for adapters and where a rank is given, dense otherwise.

    Source:
        Marczak et al., No task left behind (Iso-C), ICML 2025.
    """
    record = MergeRecord("iso_c", {"rank": rank, "svd": svd, "svd_tolerance": svd_tolerance}, tasks.shape)
    total = sum_tasks(tasks, weights)
    if isinstance(total, LowRank) or rank is not None:
        budget = _budget(tasks, rank)
        triplets = (
            total.svd()
            if isinstance(total, LowRank)
            else svd_truncated(total, budget, svd, seed=seed, tolerance=svd_tolerance)
        )
        kept = triplets.truncated(kept_directions(triplets.s, max(tasks.shape), budget))
        mean = kept.s.mean() if kept.rank else kept.s.sum()
        record.rank = kept.rank
        return MergedDelta(LowRank(kept.u * mean, None, kept.v), record)
    found = polar(total, "exact" if svd == "exact" else "auto", complete=False)
    if found.fallback is not None:
        record.fallbacks.append(f"{found.fallback}; exact form used")
    mean = (found.q * total).sum(dtype=torch.float64) / found.rank.clamp(min=1)
    return MergedDelta(found.q * mean.to(total.dtype), record)


def _iso_cts_cost(shape: tuple[int, ...], ranks: list[int | None], options: Mapping[str, Any]) -> Cost:
    m, n = shape[-2:]
    adapters = all(rank is not None for rank in ranks)
    k = min(m, n, sum(rank or 0 for rank in ranks)) if adapters else min(m, n)
    count = len(ranks) + 1
    flops = count * (4.0 * (m + n) * k * k if adapters else svd_flops(m, n, k, "exact"))
    return Cost(flops, 4 * (5 * (m + n) * k if adapters else 6 * m * n), k)


@register(
    "isotropic common and task-specific subspaces",
    scale=FULL_ALIGNMENT,
    adapter_scale=ADAPTER_ALIGNMENT,
    estimate=_iso_cts_cost,
    looks_twice=True,
)
def iso_cts(
    tasks: Tasks,
    weights: list[float],
    *,
    rank: Rank | None = None,
    common_fraction: Annotated[float, Field(gt=0, le=1)] = 0.8,
    svd: SVDMethod = "auto",
    svd_tolerance: Tolerance = 1e-2,
    seed: int = 0,
) -> MergedDelta:
    """Joins leading directions of Σ w_t D_t with directions of single tasks under a flat spectrum.

    The tail of the sum's directions gives way to the leading directions of each w_t D_t projected off the
    common left space; both sides are orthogonalised by the polar factor and every direction gets the mean of
    the kept singular values.

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0.
        rank: directions per task in the budget; default min(m, n) / T, an adapter's own rank.
        common_fraction: share of the budget (min(m, n), or Σ r_t) that the common subspace takes, rounded so
            that the rest divides among the tasks.
        svd: method of the SVDs of single tasks, see `svd_truncated`.
        svd_tolerance: tolerance of a randomized SVD, see `svd_truncated`.
        seed: seed of the randomized SVD.

    Returns:
        MergedDelta, factored.

    Accuracy:
        Ill-conditioned: the projected tasks have near-equal singular values, so float32 and float64 agree to
        about 1e-4.

    Source:
        Marczak et al., No task left behind (Iso-CTS), ICML 2025.
    """
    options = {"rank": rank, "common_fraction": common_fraction, "svd": svd, "svd_tolerance": svd_tolerance}
    record = MergeRecord("iso_cts", options, tasks.shape)
    count, budget = len(tasks), _budget(tasks, rank)
    common = int(budget * common_fraction)
    per_task = round((budget - common) / count)
    common = max(budget - per_task * count, 1)

    total = sum_tasks(tasks, weights)
    if isinstance(total, LowRank):
        svd_total = total.svd()
    else:
        svd_total = svd_truncated(total, common, svd, seed=seed, tolerance=svd_tolerance)
    del total
    head = svd_total.truncated(kept_directions(svd_total.s, max(tasks.shape), common))
    us, ss, vs = [], [], []
    for t, weight in enumerate(weights if per_task else []):
        specific = _project_off(tasks[t], head.u)
        if isinstance(specific, LowRank):
            triplets = specific.svd(may_depend=True)
        else:
            triplets = svd_truncated(
                specific, per_task, svd, seed=seed, tolerance=svd_tolerance, is_flat=True
            )
        del specific
        keep = kept_directions(triplets.s, max(tasks.shape), per_task)
        kept = triplets.truncated(keep)
        us.append(kept.u)
        ss.append(kept.s * weight)
        vs.append(kept.v)
        record.ranks.append(keep)
    spectrum = torch.cat([*ss, head.s])
    record.rank = spectrum.numel()
    record.notes.append(f"{head.rank} common directions, {per_task} per task")
    if spectrum.numel() == 0:
        m, n = tasks.shape
        return MergedDelta(LowRank(head.u.new_zeros(m, 0), None, head.v.new_zeros(n, 0)), record)
    left = cover_space(torch.cat([*us, head.u], dim=1), svd, "left", record)
    right = cover_space(torch.cat([*vs, head.v], dim=1), svd, "right", record)
    return MergedDelta(between(left, spectrum.mean().expand(spectrum.numel()), right), record)


def _project_off(delta: TaskDelta, basis: Tensor) -> Delta:
    """Computes (I − U Uᵀ) D without forming the projector."""
    if isinstance(delta, LowRank):
        left, right = delta.folded()
        return LowRank(left - basis @ (basis.mT @ left), None, right)
    if isinstance(delta, Difference):
        return delta.dense().addmm_(basis, (delta.mT @ basis).mT, alpha=-1)
    return torch.addmm(delta, basis, basis.mT @ delta, alpha=-1)
