"""Weighted average of the fine-tunes."""

from __future__ import annotations

from dirmerge.methods.registry import register
from dirmerge.methods.scale import Scale
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Tasks, sum_tasks


@register(
    "weighted mean of the fine-tunes",
    scale=Scale(value=1.0),
    elementwise=True,
    negative_weights=True,
    is_mean=True,
)
def average(tasks: Tasks, weights: list[float], *, seed: int = 0) -> MergedDelta:
    """Computes D = Σ w_t D_t / Σ w_t, so that W_0 + D is the weighted mean of the fine-tunes.

    Args:
        tasks: T deltas of any one shape; a LowRank result for adapters.
        weights: T weights with a sum other than 0.
        seed: unused, the method is deterministic.

    Source:
        Wortsman et al., Model soups, ICML 2022.
    """
    total = sum(weights)
    merged = sum_tasks(tasks, [w / total for w in weights])
    return MergedDelta(merged, MergeRecord("average", {}, tasks.shape))
