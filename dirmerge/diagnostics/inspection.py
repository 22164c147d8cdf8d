"""Inspection of a merge, planned or finished: every measure of every matrix, one in memory at a time."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dirmerge.checkpoints.adapters import is_adapter, open_adapter
from dirmerge.checkpoints.hashing import ALGORITHMS, HASH, hash_file
from dirmerge.checkpoints.reader import open_checkpoint, resolve
from dirmerge.checkpoints.safetensors_io import read_json_object
from dirmerge.checkpoints.writer import MANIFEST
from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank
from dirmerge.diagnostics import measures
from dirmerge.diagnostics.result import (
    Inspection,
    Number,
    Pairs,
    ParameterInspection,
    TaskInspection,
    alignment_terms,
    summarise,
    total_alignment,
)
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.result import Progress, ProgressCallback
from dirmerge.engine.work import MatrixWork, matrices
from dirmerge.errors import CheckpointError, DirmergeError, MismatchError, RecipeError
from dirmerge.linalg import etf_gap, svd_truncated
from dirmerge.methods import (
    AlignmentTerms,
    Factors,
    MergeRecord,
    Tasks,
    factor_tasks,
    kept_ranks,
    merge_tasks,
)
from dirmerge.methods.mda import column_signs
from dirmerge.methods.spectral import cover_space
from dirmerge.methods.tasks import Delta, sum_tasks
from dirmerge.planning import Plan, Source, TensorPlan, make_plan
from dirmerge.recipe import Recipe, load_recipe

# Up to this min(m, n) all singular values of a dense delta are computed, above it the kept ones.
SPECTRUM_UP_TO = 1024
# Leading singular values that are compared with the tasks'.
LEADING = 8
# Entries of all tasks' rows that are compared at a time for their signs.
BLOCK_ENTRIES = 1 << 22


def inspect(
    source: str | Path | Mapping[str, Any] | Recipe,
    *,
    class_means: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> Inspection:
    """Measures the directions of a merge: task spaces, their conflicts, and what the merged update keeps.

    A recipe is merged matrix by matrix in memory and nothing is written; of a finished merge the merged
    update W − W_0 is read as it was written. One matrix is in memory at a time, its deltas one after another;
    adapters stay factored, but for their signs, which are compared by blocks of rows.

    Args:
        source: a recipe (YAML file, YAML text, dict), or the folder of a finished merge.
        class_means: by name, (d, k) vectors of k classes, whose Δ_ETF is to be reported.
        progress: called with a Progress after every matrix.

    Returns:
        The inspection: plain data.

    Raises:
        RecipeError: an invalid recipe, or one that merges no matrix.
        CheckpointError: an input that cannot be read, or a folder that no merge has written.
        MismatchError: inputs that do not fit together, or have changed since the merge.
        NonFiniteError: NaN or Inf, with file and tensor.
    """
    from dirmerge import __version__

    started = time.perf_counter()
    gaps = {name: etf_gap(vectors) for name, vectors in (class_means or {}).items()}
    folder = _folder(source)
    manifest: dict[str, Any] = {}
    if folder is None:
        recipe = load_recipe(source)
        plan = make_plan(recipe, as_adapter=_needs_no_base(recipe))
    else:
        manifest, plan = _open_finished(folder)
    with closing(plan):
        if folder is None:
            parameters = _Inspector(plan, _Computed(plan), progress).parameters()
            parameters, found = _with_scale(plan, parameters)
            scale = f"{plan.scale.describe()}: {found}"
        else:
            with closing(_Written(folder, plan)) as written:
                parameters = _Inspector(plan, written, progress).parameters()
            scale = _scale_text(manifest)
    rules: Counter[str] = Counter(tensor.rule for tensor in plan.tensors if not _is_inspected(tensor))
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
        seconds=round(time.perf_counter() - started, 3),
    )


_Parameters = list[tuple[TensorPlan, ParameterInspection]]


def _folder(source: object) -> Path | None:
    if not isinstance(source, (str, Path)) or "\n" in str(source):
        return None
    path = Path(source).expanduser()
    return path if path.is_dir() else None


def _needs_no_base(recipe: Recipe) -> bool:
    """Whether a recipe without a base merges adapters alone, whose updates stand for themselves."""
    sources = [entry.model.source for entry in recipe.models]
    return recipe.base is None and all(
        isinstance(source, str) and is_adapter(resolve(source)) for source in sources
    )


def _is_inspected(tensor: TensorPlan) -> bool:
    """Whether the method merges it and it is a matrix, not a table of vectors."""
    return tensor.rule == "merge" and tensor.aligned


class _Updates(Protocol):
    """Where merged updates come from."""

    def get(
        self, tensor: TensorPlan, index: int | None, tasks: Tasks, weights: list[float], seed: int
    ) -> tuple[Delta, Factors | None, list[str]]:
        """Return a matrix's merged update, the task factors met on the way, and notes."""


class _Computed:
    """Merged updates computed by the recipe's method, without λ."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def get(
        self, tensor: TensorPlan, index: int | None, tasks: Tasks, weights: list[float], seed: int
    ) -> tuple[Delta, Factors | None, list[str]]:
        merged = merge_tasks(tasks, self.plan.method_name, weights, tensor.options, seed)
        return merged.value, merged.factors, [*merged.record.fallbacks, *merged.record.notes]


class _Written:
    """Merged updates as a finished merge has written them, λ and rounding included."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.read = DeltaReader.of(plan)
        self._checkpoint = self._adapter = None
        if plan.output == "adapter":
            adapter = open_adapter(folder)
            shapes = {f"{t.module}.weight": t.shape for t in plan.tensors if t.module is not None}
            self._adapter = adapter.orient(shapes)
        else:
            self._checkpoint = open_checkpoint(folder)

    def get(
        self, tensor: TensorPlan, index: int | None, tasks: Tasks, weights: list[float], seed: int
    ) -> tuple[Delta, Factors | None, list[str]]:
        if self._adapter is not None:
            target = self._adapter.targets.get(tensor.module or "")
            if target is None or target.shape != tasks.shape:
                raise MismatchError(f"{self.folder}: has no update of {tensor.name} with shape {tasks.shape}")
            return target.read(), None, []
        assert self._checkpoint is not None  # one of the two forms
        info = self._checkpoint.tensors.get(tensor.name)
        if info is None or tuple(info.shape) != tensor.shape:
            raise MismatchError(f"{self.folder}: has no tensor {tensor.name} of shape {tensor.shape}")
        rows = (None, None) if index is None else (index, index + 1)
        written = self._checkpoint.read(tensor.name, *rows).reshape(tasks.shape)
        base = self.read.base(tensor.name, *rows).reshape(tasks.shape)
        return Difference(written, base).dense(), None, []

    def close(self) -> None:
        """Close the folder's files."""
        if self._checkpoint is not None:
            self._checkpoint.close()


def _open_finished(folder: Path) -> tuple[dict[str, Any], Plan]:
    """Open a finished merge's manifest and plan its recipe again, from inputs that are still the same."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}; give a recipe, or a folder that `dirmerge merge` has written"
        )
    manifest = read_json_object(path, limit=1 << 28)
    recipe, output, inputs = (manifest.get(key) for key in ("recipe", "output", "inputs"))
    if not isinstance(recipe, dict) or output not in ("model", "adapter") or not isinstance(inputs, list):
        raise CheckpointError(f"{path}: is not the manifest of a merge: recipe, output or inputs are missing")
    if any(isinstance(entry, dict) and entry.get("kind") == "state dict" for entry in inputs):
        raise CheckpointError(
            f"{path}: the merge was made from state dicts in memory, which are not there any more"
        )
    try:
        loaded = load_recipe(recipe)
    except RecipeError as error:
        raise RecipeError(f"{path}: its recipe is not valid: {error}") from error
    try:
        plan = make_plan(loaded, as_adapter=output == "adapter")
    except DirmergeError as error:
        raise type(error)(
            f"{path}: the inputs of this merge cannot be opened as its recipe names them (relative paths "
            f"count from the working directory): {error}"
        ) from error
    try:
        _check_unchanged(path, inputs, plan)
    except BaseException:
        plan.close()
        raise
    return manifest, plan


def _check_unchanged(path: Path, inputs: list[Any], plan: Plan) -> None:
    known = {
        (number, file["name"]): (algorithm, file[algorithm])
        for number, entry in enumerate(inputs)
        if isinstance(entry, dict)
        for file in entry.get("files", [])
        if isinstance(file, dict) and isinstance(file.get("name"), str)
        for algorithm in ALGORITHMS
        if isinstance(file.get(algorithm), str)
    }
    for number, item in enumerate(plan.inputs):
        for file in item.files:
            algorithm, digest = known.get((number, Path(file.path).name), (HASH, None))
            if digest is None or digest != hash_file(file.path, algorithm):
                raise MismatchError(
                    f"{file.path}: is not the file that was merged ({path} has another hash for this "
                    "input, or none); merge again, or inspect the recipe instead"
                )


def _scale_text(manifest: Mapping[str, Any]) -> str:
    found = manifest.get("scale")
    if not isinstance(found, dict):
        return "as written"
    parts = []
    for key, text in (("value", "λ = {:.4g}"), ("alignment", "alignment {:.3g}")):
        value = found.get(key)
        if isinstance(value, (int, float)):
            parts.append(text.format(value))
    origin = found.get("origin")
    return f"{', '.join(parts) or 'λ per tensor'} ({origin if isinstance(origin, str) else 'as written'})"


class _Inspector:
    """Measures matrix by matrix."""

    def __init__(self, plan: Plan, updates: _Updates, progress: ProgressCallback | None) -> None:
        self.plan = plan
        self.updates = updates
        self.read = DeltaReader.of(plan)
        self._progress = progress

    def parameters(self) -> _Parameters:
        """Measure every matrix."""
        chosen = [tensor for tensor in self.plan.tensors if _is_inspected(tensor)]
        if not chosen:
            raise RecipeError(
                f"{self.plan.origin}: {self.plan.method_name} merges no matrix of these models: there "
                "is nothing to inspect"
            )
        self.read.check_base_copies()
        work = [item for tensor in chosen for item in matrices(self.plan, tensor)]
        entries = sum(math.prod(self.read.matrix_shape(item.tensor)) for item in work)
        found: _Parameters = []
        done_entries = 0
        for done, item in enumerate(work, 1):
            found.append((item.tensor, self._matrix(item)))
            done_entries += math.prod(self.read.matrix_shape(item.tensor))
            if self._progress is not None:
                self._progress(Progress("inspect", item.name, done, len(work), 0, 0, done_entries / entries))
        return found

    def _matrix(self, work: MatrixWork) -> ParameterInspection:
        tensor, index, seed = work.tensor, work.index, work.seed
        tasks, weights = self.read.tasks(tensor, index)
        sources = [source for source in tensor.sources if source.weight != 0]
        update, factors, notes = self.updates.get(tensor, index, tasks, weights, seed)
        wanted = kept_ranks(tasks)
        if factors is None or factors.asked != wanted:
            factors = factor_tasks(tasks, wanted, "auto", 1e-2, seed)
        spectra = [_spectrum(tasks, t, factors) for t in range(len(tasks))]
        weighted = [abs(w) * s for w, (s, _) in zip(weights, spectra, strict=True)]
        total = sum_tasks(tasks, weights)
        before, after = (measures.response(x, factors.u, factors.v) for x in (total, update))
        leading = _leading(total, seed), _leading(update, seed)
        del total
        signs = measures.sign_conflicts(self._row_blocks(tensor, index, sources))
        blocks = factors.blocks()
        per_task: list[TaskInspection | None] = [None] * len(self.plan.tasks)
        for t, source in enumerate(sources):
            s, energy = spectra[t]
            kept = factors.s[t]
            core = float(kept.double().square().sum())
            present = len(kept) > 0
            per_task[source.task] = TaskInspection(
                norm=abs(weights[t]) * math.sqrt(energy),
                directions=len(kept),
                core_energy=core,
                kept_energy=factors.energy[t],
                directions_90=measures.energy_directions(s, 0.9, energy),
                stable_rank=measures.stable_rank(s, energy),
                energy_curve=measures.energy_curve(s, energy),
                alignment=measures.task_alignment(after, kept, blocks[t]) if present else None,
                similarity_before=measures.directional_similarity(before, blocks[t]) if present else None,
                similarity_after=measures.directional_similarity(after, blocks[t]) if present else None,
                opposed=signs.opposed_by_task[t],
            )
        sizes = torch.cat(factors.s)
        mass = float(sizes.sum(dtype=torch.float64))
        interference = chance = None
        if mass > 0:
            interference = measures.task_interference(factors.u, sizes, factors.v) / mass
            chance = measures.chance_interference(factors.s, *_matrix_shape(tasks)) / mass
        norm = _norm(update)
        return ParameterInspection(
            name=work.name,
            shape=_matrix_shape(tasks),
            scale=1.0,
            tasks=per_task,
            left=self._pairs(factors.u, blocks, sources),
            right=self._pairs(factors.v, blocks, sources),
            interference=interference,
            interference_chance=chance,
            alignment=total_alignment(per_task),
            outside_etf=_outside_etf(update, factors),
            outside_etf_shared=1 / math.sqrt(len(sizes)) if len(sizes) > 1 else None,
            sign_conflict=signs.share,
            sign_chance=signs.chance,
            opposed=signs.opposed,
            accumulation=measures.accumulation(leading[0], weighted, LEADING),
            accumulation_merged=measures.accumulation(leading[1], weighted, LEADING),
            merged_norm=norm,
            merged_stable_rank=measures.stable_rank(leading[1], norm**2),
            notes=list(dict.fromkeys(notes)),
        )

    def _pairs(self, bases: Tensor, blocks: Sequence[slice], sources: Sequence[Source]) -> Pairs:
        """Return the tables of the tasks that take part, at the places of all tasks."""
        found = measures.compare_spaces(bases, blocks)
        count = len(self.plan.tasks)
        tables = {}
        for name in Pairs.model_fields:
            table: list[list[Number]] = [[None] * count for _ in range(count)]
            for i, row in zip(sources, getattr(found, name), strict=True):
                for j, value in zip(sources, row, strict=True):
                    table[i.task][j.task] = value
            tables[name] = table
        return Pairs(**tables)

    def _row_blocks(
        self, tensor: TensorPlan, index: int | None, sources: Sequence[Source]
    ) -> Iterator[Tensor]:
        """Yield (T, rows, n) the same rows of all weighted deltas, adapters multiplied out row by row."""
        m, n = self.read.matrix_shape(tensor)
        updates = self.read.low_ranks(tensor)
        is_dense = any(source.rank is None for source in sources)
        step = max(1, BLOCK_ENTRIES // (n * len(sources)))
        ranges = (
            [(start, min(start + step, m)) for start in range(0, m, step)]
            if index is None
            else [(index, index + 1)]
        )
        for start, stop in ranges:
            base = self.read.base(tensor.name, start, stop) if is_dense else None
            rows = [
                self.read.rows(source, base, start, stop, updates.get(source.task))
                .reshape(-1, n)
                .mul_(source.weight)
                for source in sources
            ]
            yield torch.stack(rows)


def _matrix_shape(tasks: Tasks) -> tuple[int, int]:
    m, n = tasks.shape
    return m, n


def _spectrum(tasks: Tasks, t: int, factors: Factors) -> tuple[Tensor, float]:
    """Return the singular values of a task as far as they are known, and ‖D_t‖²_F."""
    if tasks.ranks[t] is None and min(tasks.shape) > SPECTRUM_UP_TO:
        s = factors.s[t].double()
        return s, float(s.square().sum()) / factors.energy[t] if factors.energy[t] > 0 else 0.0
    s = measures.singular_values(tasks[t])
    return s, float(s.square().sum())


def _leading(delta: Delta, seed: int) -> Tensor:
    """Return at least the leading singular values of an update."""
    if isinstance(delta, LowRank) or min(delta.shape) <= SPECTRUM_UP_TO:
        return measures.singular_values(delta)
    return svd_truncated(delta, LEADING, "auto", seed=seed).s.double()


def _norm(delta: Delta) -> float:
    if isinstance(delta, LowRank):
        return delta.norm()
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64))


def _outside_etf(update: Delta, factors: Factors) -> float | None:
    m, k = factors.u.shape
    if not 2 <= k <= m:
        return None
    frame = cover_space(factors.u, "auto", "left", MergeRecord("inspect", {}, tuple(update.shape))).frame()
    return measures.energy_outside_etf(update, frame, column_signs(factors.u))


def _with_scale(plan: Plan, parameters: _Parameters) -> tuple[_Parameters, str]:
    """Multiply every matrix's figures by its λ, found as a merge finds it; with words on what was found."""
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
