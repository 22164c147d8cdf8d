"""Weighted average of the fine-tunes."""

from __future__ import annotations

from collections.abc import Sequence

from dirmerge.methods.registry import linear_rows, register
from dirmerge.methods.scale import Scale
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Tasks, sum_tasks


def _coefficients(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]


@register(
    "weighted mean of the fine-tunes",
    scale=Scale(value=1.0),
    elementwise=True,
    negative_weights=True,
    is_mean=True,
    rows=linear_rows(_coefficients),
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
    merged = sum_tasks(tasks, _coefficients(weights))
    return MergedDelta(merged, MergeRecord("average", {}, tasks.shape))
