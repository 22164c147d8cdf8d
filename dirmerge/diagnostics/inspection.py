"""Inspection of a merge, planned or finished: every measure of its matrices, one matrix at a time."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirmerge.checkpoints.adapters import is_adapter
from dirmerge.checkpoints.hub import resolve
from dirmerge.diagnostics.measuring import Inspector, Parameters, is_inspected
from dirmerge.diagnostics.result import Inspection, alignment_terms, summarise
from dirmerge.diagnostics.updates import ComputedUpdates, WrittenUpdates, open_finished, scale_text
from dirmerge.engine.compute import Budget, Compute
from dirmerge.engine.lanes import on_device
from dirmerge.engine.result import ProgressCallback
from dirmerge.errors import RecipeError
from dirmerge.linalg import etf_gap
from dirmerge.methods import AlignmentTerms
from dirmerge.planning import Plan, TensorPlan, make_plan
from dirmerge.recipe import Recipe, load_recipe


def inspect(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    class_means: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
) -> Inspection:
    """Measures the directions of a merge: task spaces, their conflicts, and what the merged update keeps.

    A recipe is merged matrix by matrix in memory and nothing is written; of a finished merge the merged
    update W − W_0 is read as it was written. One matrix is in memory at a time, its deltas one after another;
    adapters stay factored, but for their signs, which are compared by blocks of rows.

    Args:
        source: a recipe (YAML file, YAML text, dict), or the folder of a finished merge.
        class_means: by name, (d, k) vectors of k classes, whose Δ_ETF is to be reported.
        progress: called with a Progress after every matrix.
        device: where the directions are computed, as of `dirmerge.merge`; of several GPUs the first.
        threads: of the CPU; torch's number by default.
        memory: most bytes, or a size such as "12GB", of the host's memory and of the GPU's.

    Returns:
        The inspection: plain data.

    Raises:
        RecipeError: an invalid recipe, or one that merges no matrix.
        CheckpointError: an input that cannot be read, or a folder that no merge has written.
        MismatchError: inputs that do not fit together, or have changed since the merge.
        NonFiniteError: NaN or Inf, with file and tensor.
        ValueError: a device, thread number or size that makes no sense or is not there.
    """
    from dirmerge import __version__

    started = time.perf_counter()
    compute = Compute.resolve(device, threads, memory).on_first()
    gaps = {name: etf_gap(vectors) for name, vectors in (class_means or {}).items()}
    folder = _folder(source)
    manifest: dict[str, Any] = {}
    if folder is None:
        recipe = load_recipe(source)
        plan = make_plan(recipe, as_adapter=_needs_no_base(recipe))
    else:
        manifest, plan = open_finished(folder)
    with closing(plan), compute.scoped_threads(), on_device(compute.device):
        # Refuses a memory that is too small before anything is read.
        Budget.of_plan(compute, plan)
        if folder is None:
            parameters = Inspector(plan, ComputedUpdates(plan), compute.device, progress).parameters()
            parameters, found = _with_scale(plan, parameters)
            scale = f"{plan.scale.describe()}: {found}"
        else:
            with closing(WrittenUpdates(folder, plan)) as written:
                parameters = Inspector(plan, written, compute.device, progress).parameters()
            scale = scale_text(manifest)
    rules: Counter[str] = Counter(tensor.rule for tensor in plan.tensors if not is_inspected(tensor))
    return Inspection(
        dirmerge=__version__,
        source=str(folder) if folder is not None else plan.origin,
        finished=folder is not None,
        method=plan.method_name,
        options=dict(plan.recipe.get("parameters") or {}),
        scale=scale,
        base=None if plan.base is None else plan.base.label,
        tasks=[task.label for task in plan.tasks],
        parameters=[parameter for _, parameter in parameters],
        left_out=dict(rules),
        class_gaps=gaps,
        summary=summarise([parameter for _, parameter in parameters], len(plan.tasks)),
        notes=list(plan.notes),
        compute=compute.to_dict(),
        seconds=round(time.perf_counter() - started, 3),
    )


def _folder(source: object) -> Path | None:
    if not isinstance(source, (str, Path)) or "\n" in str(source):
        return None
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def _needs_no_base(recipe: Recipe) -> bool:
    """Whether a recipe has no base and merges adapters only, whose updates need none."""
    sources = [entry.model.source for entry in recipe.models]
    return recipe.base is None and all(
        isinstance(source, str) and is_adapter(resolve(source)) for source in sources
    )


def _with_scale(plan: Plan, parameters: Parameters) -> tuple[Parameters, str]:
    """Multiplies every matrix's figures by its λ, chosen as in a merge; also returns λ in words."""
    by_name: dict[str, list[AlignmentTerms]] = defaultdict(list)
    for tensor, parameter in parameters:
        for name in ("", tensor.name):
            by_name[name].append(alignment_terms(parameter.tasks))
    terms = {name: AlignmentTerms.total(found) for name, found in by_name.items()}

    def scale(tensor: TensorPlan) -> float:
        if tensor.scale is not None:
            return tensor.scale
        target = plan.scale.alignment
        assert target is not None  # a plan has either a scale or an alignment
        name = "" if plan.scale.per == "model" else tensor.name
        try:
            return terms[name].scale_for(target)
        except ValueError as error:
            place = f"{name}: " if name else ""
            raise RecipeError(f"{plan.origin}: alignment: {place}{error}") from error

    scaled = [(tensor, parameter.scaled(scale(tensor))) for tensor, parameter in parameters]
    values = sorted({parameter.scale for _, parameter in scaled})
    text = f"λ = {values[0]:.4g}" if len(values) == 1 else f"λ from {values[0]:.4g} to {values[-1]:.4g}"
    return scaled, text
