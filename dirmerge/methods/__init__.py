"""Merge methods: pure functions of the tasks' deltas, and the registry that other packages extend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dirmerge.difference import Difference
from dirmerge.linalg import all_finite, single_thread
from dirmerge.lowrank import LowRank
from dirmerge.methods.average import average
from dirmerge.methods.common import (
    Factors,
    MergedDelta,
    MergeRecord,
    Scale,
    TaskDelta,
    Tasks,
    factor_tasks,
    kept_ranks,
)
from dirmerge.methods.dc_merge import dc_merge
from dirmerge.methods.iso import iso_c, iso_cts
from dirmerge.methods.mda import mda
from dirmerge.methods.registry import METHODS, Method, get_method, register
from dirmerge.methods.task_arithmetic import task_arithmetic
from dirmerge.methods.ties import ties
from dirmerge.methods.tsv_m import tsv_m
from dirmerge.methods.whitened import whitened
from dirmerge.methods.wudi import wudi

__all__ = [
    "METHODS",
    "Factors",
    "MergeRecord",
    "MergedDelta",
    "Method",
    "Scale",
    "Tasks",
    "average",
    "dc_merge",
    "factor_tasks",
    "get_method",
    "iso_c",
    "iso_cts",
    "kept_ranks",
    "mda",
    "merge_deltas",
    "merge_tasks",
    "register",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "whitened",
    "wudi",
]


def merge_tasks(
    tasks: Tasks, method: str, weights: Sequence[float], options: Mapping[str, Any], seed: int = 0
) -> MergedDelta:
    """Merges lazily loaded deltas by a registered method; `merge_deltas` wraps it for deltas in memory.

    Args:
        tasks: the deltas; those of weight 0 are left out before the method sees them.
        method: name of a registered method.
        weights: one per task.
        options: of the method, checked here.
        seed: of whatever is random in it.

    Raises:
        ValueError: for an unknown method, options or weights without meaning, or shapes the method cannot
        merge.
    """
    chosen = get_method(method)
    if len(tasks) == 0:
        raise ValueError("at least one delta is needed, got none")
    if len(weights) != len(tasks):
        raise ValueError(f"weights must have one entry per delta, got {len(weights)} for {len(tasks)}")
    numbers = [float(w) for w in weights]
    if not all(math.isfinite(w) for w in numbers):
        raise ValueError(f"weights must be finite, got {numbers}")
    chosen.check_weights(numbers)
    if not chosen.elementwise and (len(tasks.shape) != 2 or 0 in tasks.shape):
        raise ValueError(f"{method} merges matrices of shape (m, n), got {tasks.shape}")
    checked = chosen.validate(options, adapters=tasks.low_rank)
    present = [t for t, w in enumerate(numbers) if w != 0]
    if len(present) < len(tasks):
        tasks, numbers = tasks.subset(present), [numbers[t] for t in present]
    with single_thread(tasks.width):
        merged = chosen.function(tasks, numbers, seed=seed, **checked)
    merged.record.weights = [float(w) for w in weights]
    return merged


def merge_deltas(
    deltas: Sequence[TaskDelta],
    method: str = "dc_merge",
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    alignment: float | None = None,
    seed: int = 0,
    **options: Any,
) -> MergedDelta:
    """Merges the deltas D_t = W_t − W_0 of one parameter into one update D.

    Adapters given as LowRank stay factored: no product is formed (but for `ties` and for `wudi` by Adam,
    which act on entries).

    Args:
        deltas: T tensors, Differences of two weights (never formed where the method can do without) or
            LowRank matrices, of one shape (m, n), mixed ranks and mixtures allowed; `average`,
            `task_arithmetic` and `ties` take tensors of any shape. bf16 and fp16 are computed in float32; one
            float64 input makes all float64.
        method: name of a registered method.
        weights: one per delta, default 1; a delta of weight 0 is left out. Their meaning is the method's.
        scale: λ to multiply into D; default 1, the method's own D.
        alignment: target for a(λD) from which λ follows, in place of `scale`.
        seed: of randomized parts.
        **options: of the method, see its docstring.

    Returns:
        MergedDelta with `dense()`, `low_rank()` and `record`.

    Raises:
        TypeError: for deltas that are neither tensors nor Difference nor LowRank.
        ValueError: for unknown methods or options, wrong ranges, shapes that differ, NaN or Inf.

    Example:
        >>> merged = dirmerge.merge_deltas([dirmerge.Difference(w, w0) for w in (w1, w2)], method="tsv_m")
        >>> weight = w0 + 1.2 * merged.dense()
    """
    from dirmerge.scale import align

    if not isinstance(deltas, (list, tuple)):
        raise TypeError(f"deltas must be a list of tensors or LowRank matrices, got {type(deltas).__name__}")
    if not deltas:
        raise ValueError("at least one delta is needed, got none")
    if scale is not None and alignment is not None:
        raise ValueError("scale and alignment both set λ; give one of them")
    for name, value in (("scale", scale), ("alignment", alignment)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    checked = _checked(deltas)
    tasks = Tasks(
        tuple(checked[0].shape),
        [lambda delta=delta: delta for delta in checked],  # type: ignore[misc]
        [delta.rank if isinstance(delta, LowRank) else None for delta in checked],
        device=_parts(checked[0])[0].device,
    )
    merged = merge_tasks(tasks, method, [1.0] * len(deltas) if weights is None else weights, options, seed)
    if alignment is not None:
        return align(tasks, merged, alignment, seed)
    return merged if scale is None else merged.scaled(scale)


def _checked(deltas: Sequence[TaskDelta]) -> list[TaskDelta]:
    """Returns the deltas in one arithmetic dtype, after all checks; the inputs are never written to."""
    for t, delta in enumerate(deltas):
        if not isinstance(delta, (Tensor, Difference, LowRank)):
            raise TypeError(
                f"deltas[{t}] must be a torch.Tensor, a Difference or a LowRank, got {type(delta).__name__}"
            )
        if isinstance(delta, Tensor) and not delta.is_floating_point():
            raise ValueError(f"deltas[{t}] must be floating point, got {delta.dtype}")
        if isinstance(delta, Difference) and delta.ndim == 3:
            raise ValueError(f"deltas[{t}] must be one Difference, got a batch of {len(delta.weights)}")
        if tuple(delta.shape) != tuple(deltas[0].shape):
            raise ValueError(
                f"all deltas must have one shape: deltas[0] has {tuple(deltas[0].shape)}, "
                f"deltas[{t}] {tuple(delta.shape)}"
            )
        if not all(all_finite(part) for part in _parts(delta)):
            raise ValueError(f"deltas[{t}] must be finite, got NaN or Inf")
    double = any(delta.dtype == torch.float64 for delta in deltas)
    dtype = torch.float64 if double else torch.float32
    return [_in_dtype(delta, dtype) for delta in deltas]


def _parts(delta: TaskDelta) -> list[Tensor]:
    if isinstance(delta, Tensor):
        return [delta]
    if isinstance(delta, Difference):
        return [*delta.weights, delta.base]
    return [delta.left, delta.right, *([] if delta.core is None else [delta.core])]


def _in_dtype(delta: TaskDelta, dtype: torch.dtype) -> TaskDelta:
    if isinstance(delta, Tensor):
        return delta.to(dtype).detach()
    if isinstance(delta, Difference):
        # The arithmetic is float32 for all but float64 weights: these need no copy.
        return delta if delta.dtype == dtype else replace(delta, base=delta.base.to(dtype))
    return delta.to(dtype)
