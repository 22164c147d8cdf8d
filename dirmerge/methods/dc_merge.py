"""DC-Merge: balanced task energies, aggregated in a shared orthogonal cover space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from dirmerge.linalg import SVDMethod
from dirmerge.methods.registry import register
from dirmerge.methods.scale import ADAPTER_ALIGNMENT, FULL_ALIGNMENT
from dirmerge.methods.spectral import (
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
from dirmerge.ops import elect_merge, kth_largest_magnitude


def _check(options: Mapping[str, Any], adapters: bool) -> None:
    check_smoothing("dc_merge", options, adapters)
    if "keep" in options and options.get("keep_per_rank") is not None:
        raise ValueError("dc_merge: keep and keep_per_rank both set the entries that pass; give one of them")


@register(
    "energy balancing, shared cover space, filtered sign election",
    scale=FULL_ALIGNMENT,
    adapter_scale=ADAPTER_ALIGNMENT,
    check=_check,
    leaves_factors=True,
)
def dc_merge(
    tasks: Tasks,
    weights: list[float],
    *,
    rank: Rank | None = None,
    smoothing: Smoothing | None = None,
    rho: Annotated[float, Field(ge=1)] = 5.0,
    keep: Annotated[float, Field(gt=0, le=1)] = 1e-3,
    keep_per_rank: Annotated[float, Field(gt=0)] | None = None,
    block_mask: bool = True,
    svd: SVDMethod = "auto",
    svd_tolerance: Tolerance = 1e-2,
    seed: int = 0,
) -> MergedDelta:
    """Computes D = C_u M C_vᵀ: the elected coordinates of the balanced tasks in their cover space.

    C_u = polar([U_1 … U_T]), C_v = polar([V_1 … V_T]); M_t = C_uᵀ U_t diag(s̃_t) V_tᵀ C_v is filtered to its
    largest magnitudes, merged by sign election and disjoint mean, and only the T diagonal blocks stay.

    The published `keep` is another multiple of the rank at each width: about 3 r entries at 384, 8 tasks,
    and 33 r at 4096, but less than r with few adapters, which cost 12 points of accuracy with four of them.
    `keep_per_rank` is the same everywhere. From 1 to 30 it makes no difference for adapters; for full
    fine-tunes 1 and 3 are best, 10 loses 0.4 points and 30 loses 1.1: 3 is the value to take
    (benchmarks/results/tasks.md).

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0 of the election and of the mean.
        rank: directions kept per task; default ⌊min(m, n) / T⌋, an adapter's own rank.
        smoothing: of each task's singular values, their sum kept: "none" (default for dense deltas),
            "average" (default for adapters: all equal) or "linear" (falling from min(ρ, s_1/s_r) to 1).
        rho: ρ of the linear smoothing.
        keep: fraction of d² entries that pass the filter per task, d = min(m, n) for full fine-tunes, Σ r_t
            for adapters or where a rank is given; ties with the last one pass too.
        keep_per_rank: in place of `keep`: entries per task as a multiple of its rank.
        block_mask: whether only the diagonal blocks of the merged core stay.
        svd: method of the SVDs, see `svd_truncated`.
        svd_tolerance: tolerance of a randomized SVD, see `svd_truncated`.
        seed: seed of the randomized SVD.

    Returns:
        MergedDelta, factored with rank Σ r_t.

    Accuracy:
        The filter and the election are steps: a rounding error upstream can flip an entry near the
        threshold. Exact mode agrees with the published implementation to 2e-5.

    Source:
        DC-Merge, arXiv 2603.06242.
    """
    smoothing = smoothing or default_smoothing(tasks.low_rank)
    options = {
        "rank": rank,
        "smoothing": smoothing,
        **({"rho": rho} if smoothing == "linear" else {}),
        **({"keep": keep} if keep_per_rank is None else {"keep_per_rank": keep_per_rank}),
        "block_mask": block_mask,
        "svd": svd,
        "svd_tolerance": svd_tolerance,
    }
    record = MergeRecord("dc_merge", options, tasks.shape)
    factors = factor_tasks(tasks, kept_ranks(tasks, rank), svd, svd_tolerance, seed)
    record.ranks, record.energy, record.notes = factors.ranks, factors.energy, list(factors.notes)
    size = sum(factors.ranks)
    if size == 0:
        return empty_result(tasks, record, factors)
    left = cover_space(factors.u, svd, "left", record)
    right = cover_space(factors.v, svd, "right", record)
    record.rank = size

    d = size if tasks.low_rank or rank is not None else min(tasks.shape)
    counts = [
        min(max(1, math.floor(keep * d * d if keep_per_rank is None else keep_per_rank * r)), size * size)
        for r in factors.ranks
    ]
    widest = max(factors.ranks)
    if keep_per_rank is None and counts[0] < widest:
        # With few adapters the published fraction keeps less than one entry per direction: 2 of 48 x 48 for
        # three of rank 16, where keeping 16 was worth 9 points of accuracy.
        record.notes.append(
            f"the filter keeps {counts[0]} entries per task, fewer than the rank {widest}: set "
            "keep_per_rank, say to 3"
        )
    own_blocks = factors.blocks()
    # Outside the diagonal blocks M_t only takes part in its own threshold, so one M_t at a time is formed
    # and its blocks are kept.
    blocks = own_blocks if block_mask else [slice(0, size)]
    extents = [block.stop - block.start for block in blocks]
    kept = factors.u.new_empty(len(tasks), sum(extent * extent for extent in extents))
    thresholds = factors.u.new_empty(len(tasks))
    for t, (own, s) in enumerate(zip(own_blocks, factors.s, strict=True)):
        coordinates = (left.coordinates[:, own] * balanced(s, smoothing, rho)) @ right.coordinates[:, own].mT
        thresholds[t] = kth_largest_magnitude(coordinates.unsqueeze(0), counts[t])[0]
        torch.cat([coordinates[block, block].reshape(-1) for block in blocks], out=kept[t])
    merged = elect_merge(kept, thresholds, torch.tensor(weights, dtype=kept.dtype).tolist())
    core = factors.u.new_zeros(size, size)
    offset = 0
    for block, extent in zip(blocks, extents, strict=True):
        core[block, block] = merged[offset : offset + extent * extent].view(extent, extent)
        offset += extent * extent
    return MergedDelta(between(left, core, right), record, factors)
