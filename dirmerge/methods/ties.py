"""TIES: trim, elect signs, disjoint mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dirmerge.methods.registry import RowForm, register
from dirmerge.methods.scale import Scale
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Tasks
from dirmerge.ops import delta_elect_add, delta_kth_magnitude, elect_merge, kth_largest_magnitude
from dirmerge.ops.delta_add import DeltaAdd

DENSITY = 0.2


def _kept(density: float, numel: int) -> int:
    return max(1, math.floor(density * numel))


def _threshold(options: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Returns what finds a task's threshold, None where nothing is trimmed."""
    density = options.get("density", DENSITY)
    if density >= 1:
        return None
    return lambda base, weight: delta_kth_magnitude(base, [weight], _kept(density, weight.numel())).thresholds


def _add(
    base: Tensor,
    weights: Sequence[Tensor],
    task_weights: Sequence[float],
    scale: float,
    thresholds: Tensor | None,
    dtype: torch.dtype,
) -> DeltaAdd:
    return delta_elect_add(base, weights, thresholds, task_weights, scale=scale, out_dtype=dtype)


@register(
    "trim small entries, elect signs, disjoint mean",
    scale=Scale(value=1.08, at_tasks=8, limit=1.5),
    elementwise=True,
    rows=RowForm(_add, _threshold),
)
def ties(
    tasks: Tasks,
    weights: list[float],
    *,
    density: Annotated[float, Field(gt=0, le=1)] = DENSITY,
    seed: int = 0,
) -> MergedDelta:
    """Keeps each task's largest entries, elects signs by Σ w_t D_t and averages the entries that have them.

    The threshold is taken per tensor and task, with all entries that tie with it kept, so that a model can
    be streamed; the paper takes one threshold per task over the whole model. Adapters are multiplied out:
    the trimmed entries have no factors.

    Args:
        tasks: T deltas of any one shape.
        weights: T weights >= 0 of the election and of the mean.
        density: fraction of entries kept.
        seed: unused, the method is deterministic.

    Source:
        Yadav et al., TIES-Merging, NeurIPS 2023.
    """
    first = tasks.dense(0)
    stack = first.new_empty((len(tasks), *first.shape))
    stack[0] = first
    del first
    for t in range(1, len(tasks)):
        stack[t] = tasks.dense(t)
    count = _kept(density, stack[0].numel())
    thresholds = kth_largest_magnitude(stack, count) if density < 1 else None
    merged = elect_merge(stack, thresholds, torch.tensor(weights, dtype=stack.dtype).tolist())
    return MergedDelta(merged, MergeRecord("ties", {"density": density}, tasks.shape))
