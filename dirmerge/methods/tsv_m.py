"""TSV-M: singular vectors of all tasks, decorrelated by the polar factor."""

from __future__ import annotations

from dirmerge.linalg import SVDMethod
from dirmerge.methods.registry import register
from dirmerge.methods.scale import ADAPTER_ALIGNMENT, FULL_ALIGNMENT
from dirmerge.methods.spectral import between, cover_space, empty_result, factor_tasks
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Rank, Tasks, Tolerance, kept_ranks


@register(
    "whitened task singular vectors",
    scale=FULL_ALIGNMENT,
    adapter_scale=ADAPTER_ALIGNMENT,
    leaves_factors=True,
)
def tsv_m(
    tasks: Tasks,
    weights: list[float],
    *,
    rank: Rank | None = None,
    svd: SVDMethod = "auto",
    svd_tolerance: Tolerance = 1e-2,
    seed: int = 0,
) -> MergedDelta:
    """Computes D = polar([U_1 … U_T]) diag(w_1 S_1, …, w_T S_T) polar([V_1 … V_T])ᵀ.

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0 of the singular values.
        rank: directions kept per task; default ⌊min(m, n) / T⌋, an adapter's own rank.
        svd: method of the SVDs, see `svd_truncated`.
        svd_tolerance: tolerance of a randomized SVD, see `svd_truncated`.
        seed: seed of the randomized SVD.

    Returns:
        MergedDelta, factored with rank Σ r_t.

    Source:
        Gargiulo et al., Task Singular Vectors, CVPR 2025.
    """
    record = MergeRecord("tsv_m", {"rank": rank, "svd": svd, "svd_tolerance": svd_tolerance}, tasks.shape)
    factors = factor_tasks(tasks, kept_ranks(tasks, rank), svd, svd_tolerance, seed)
    record.ranks, record.energy, record.notes = factors.ranks, factors.energy, list(factors.notes)
    if sum(factors.ranks) == 0:
        return empty_result(tasks, record, factors)
    left = cover_space(factors.u, svd, "left", record)
    right = cover_space(factors.v, svd, "right", record)
    record.rank = sum(factors.ranks)
    return MergedDelta(between(left, factors.weighted(weights), right), record, factors)
