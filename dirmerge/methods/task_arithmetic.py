"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from dirmerge.methods.registry import linear_rows, register
from dirmerge.methods.scale import Scale
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Tasks, sum_tasks


@register(
    "sum of the task vectors",
    scale=Scale(value=0.43, at_tasks=8, power=1.0),
    elementwise=True,
    negative_weights=True,
    rows=linear_rows(list),
)
def task_arithmetic(tasks: Tasks, weights: list[float], *, seed: int = 0) -> MergedDelta:
    """Computes D = Σ w_t D_t.

    Args:
        tasks: T deltas of any one shape; a LowRank result for adapters.
        weights: T weights; a negative one takes its task away.
        seed: unused, the method is deterministic.

    Source:
        Ilharco et al., Editing models with task arithmetic, ICLR 2023.
    """
    return MergedDelta(sum_tasks(tasks, weights), MergeRecord("task_arithmetic", {}, tasks.shape))
