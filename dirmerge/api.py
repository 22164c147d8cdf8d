"""The Python API: plans and merges of whole models, and of the deltas of one parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine import pipeline
from dirmerge.engine.compute import Compute
from dirmerge.engine.result import MergeResult, ProgressCallback
from dirmerge.linalg import all_finite
from dirmerge.linalg.conditions import optimistic
from dirmerge.methods import MergedDelta, Tasks, merge_tasks
from dirmerge.methods.scale import align
from dirmerge.methods.tasks import TaskDelta
from dirmerge.planning import Plan, make_plan
from dirmerge.recipe import Recipe, load_recipe

RecipeSource = str | Path | Mapping[str, Any] | Recipe


def plan(recipe: RecipeSource, *, as_adapter: bool = False, rank: int | None = None) -> Plan:
    """Plans a merge from the headers of its inputs: no weight is read and nothing is written.

    Args:
        recipe: a YAML file, YAML text of several lines, or the same as a dict, in which state dicts may stand
            for paths.
        as_adapter: plan a PEFT adapter instead of a model; all models must be adapters.
        rank: rank of that adapter; by default Σ r_t.

    Returns:
        The plan: every output tensor with its inputs, rule, shape, dtype and cost.

    Raises:
        RecipeError: an invalid recipe; lists all that is wrong with it.
        CheckpointError: an input that cannot be read.
        MismatchError: inputs that do not fit together; lists every problem with the rule that resolves it.

    Example:
        >>> print(dirmerge.plan("recipe.yml").totals())
    """
    return make_plan(load_recipe(recipe), as_adapter=as_adapter, rank=rank)


def merge(
    recipe: RecipeSource,
    out: str | Path | None = None,
    *,
    as_adapter: bool = False,
    rank: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
) -> MergeResult:
    """Merges fine-tuned models into one: W = W_0 + λ D for every weight, from files to files.

    Memory is bounded by the largest tensors and does not grow with the model. On a GPU the same directions
    come out within the accuracy of the method.

    Args:
        recipe: a YAML file, YAML text of several lines, or the same as a dict, in which state dicts may stand
            for paths.
        out: the folder to write, which appears complete or not at all; None for a state dict in the result.
        as_adapter: write a PEFT adapter instead of a model; all models must be adapters.
        rank: rank of that adapter; by default Σ r_t.
        overwrite: whether an existing folder may be replaced; only one that dirmerge wrote and that holds no
            input, no recipe and not the working directory is.
        progress: called with a Progress after every tensor.
        device: `auto` (the default: the GPUs that are visible, else the CPU), `cpu`, `cuda`, or
            `cuda:N[,cuda:M]`: several GPUs share the work.
        threads: of the CPU; torch's number by default.
        memory: most bytes, or a size such as "12GB", that the process may use of the host's memory and of
            each GPU's; no limit by default.

    Returns:
        MergeResult with `path` or `state_dict`, the λ used, a record per tensor, and `summary()`.

    Raises:
        ValueError: a device, thread number or size that makes no sense or is not there.
        RecipeError: an invalid recipe; lists all that is wrong with it. Or too little memory: says how much
            is enough.
        CheckpointError: an input that cannot be read.
        MismatchError: inputs that do not fit together; lists every problem with the rule that resolves it.
        NonFiniteError: NaN or Inf, with file and tensor.
        OutputError: the folder exists or cannot be written.

    Example:
        >>> result = dirmerge.merge("recipe.yml", "merged")
        >>> print(result.summary())
    """
    compute = Compute.resolve(device, threads, memory)
    planned = plan(recipe, as_adapter=as_adapter, rank=rank)
    return pipeline.run(planned, out, overwrite=overwrite, progress=progress, compute=compute)


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
    if not isinstance(deltas, (list, tuple)):
        raise TypeError(f"deltas must be a list of tensors or LowRank matrices, got {type(deltas).__name__}")
    if not deltas:
        raise ValueError("at least one delta is needed, got none")
    if scale is not None and alignment is not None:
        raise ValueError("scale and alignment both set λ; give one of them")
    for name, value in (("scale", scale), ("alignment", alignment)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")

    def run() -> MergedDelta:
        return _merge_deltas(deltas, method, weights, scale, alignment, seed, options)

    if not isinstance(deltas[0], (Tensor, Difference, LowRank)) or _parts(deltas[0])[0].is_cpu:
        return run()
    (merged,), _ = optimistic([run], _numbers, _with)
    return merged


def _merge_deltas(
    deltas: Sequence[TaskDelta],
    method: str,
    weights: Sequence[float] | None,
    scale: float | None,
    alignment: float | None,
    seed: int,
    options: Mapping[str, Any],
) -> MergedDelta:
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


def _numbers(merged: MergedDelta) -> list[float]:
    return merged.record.energy


def _with(merged: MergedDelta, numbers: Sequence[float]) -> MergedDelta:
    merged.record.energy = list(numbers)
    if merged.factors is not None:
        merged.factors.energy = list(numbers)
    return merged


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
