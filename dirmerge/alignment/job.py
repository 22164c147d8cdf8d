"""One run of `dirmerge.align`: merges, reads features, fits or learns maps, and merges again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dirmerge.alignment.features import last_linear
from dirmerge.alignment.heads import FOLDER
from dirmerge.alignment.learned import Learned, LearnProgress
from dirmerge.alignment.learning import adamerging, learn
from dirmerge.alignment.maps import MapKind, TaskMap, fit_task
from dirmerge.alignment.model import AlignmentTask, Model, read_features
from dirmerge.alignment.result import AlignProgress, AlignResult
from dirmerge.alignment.sources import TaskSource, open_sources
from dirmerge.alignment.stored import UpdateReader, absorb, fill, updated_weight, weighted_deltas, wide
from dirmerge.checkpoints.reader import Checkpoint, open_checkpoint
from dirmerge.engine import pipeline
from dirmerge.engine.compute import Compute
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.result import MergeResult, Progress
from dirmerge.methods.tasks import Delta
from dirmerge.planning import Plan, ScalePlan, TensorPlan, make_plan
from dirmerge.recipe import Recipe, Setting, TensorRule
from dirmerge.recipe.align import AlignSection


class Job:
    """One run of `align`."""

    def __init__(
        self,
        recipe: Recipe,
        section: AlignSection,
        compute: Compute,
        progress: Callable[[AlignProgress], None] | None,
    ) -> None:
        self.section = section
        self.compute = compute
        self.progress = progress
        self.notes: list[str] = []
        self._tasks: dict[str, AlignmentTask] = {}
        self.sources = open_sources(recipe, section)
        paths = {last_linear(s.module(empty=True)) for s in self.sources if s.section.head is None}
        self.notes += [f"{path}: every task keeps its own, in {FOLDER}/" for path in sorted(paths)]
        rules = tuple(TensorRule(match=(f"{path}.*", f"*.{path}.*"), rule="drop") for path in sorted(paths))
        self.recipe = _changed(recipe, tensors=(*rules, *recipe.tensors)) if rules else recipe

    def run(self, folder: Path, state: str | Path | None) -> AlignResult:
        """Merges into `folder` and aligns every task; a learned form uses `start` beside it for a while."""
        method = self.section.method
        if method in ("learned", "adamerging"):
            return self._learned(folder, state)
        merged = self._merge(make_plan(self.recipe), folder)
        with closing(make_plan(self.recipe)) as plan, open_checkpoint(folder) as checkpoint:
            fits = self._fit(plan, checkpoint, "rotation" if method == "rotation" else "ridge")
        heads = {fit.name: fit.head for fit in fits}
        notes = [*self.notes, *merged.notes]
        return AlignResult(
            folder, method, merged, heads, fits, None, self.compute.on_first().to_dict(), notes
        )

    def _merge(self, plan: Plan, folder: Path) -> MergeResult:
        def step(value: Progress) -> None:
            self._tell("merge", value.name, value.done, value.total)

        return pipeline.run(plan, folder, progress=step, compute=self.compute)

    def _tell(self, phase: str, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(AlignProgress(phase, name, done, total))

    def _fit(self, plan: Plan, merged: Checkpoint, kind: MapKind) -> list[TaskMap]:
        """Fits every task's map; one module is in memory at a time."""
        reader, found = DeltaReader.of(plan), []
        for i, source in enumerate(self.sources):
            found.append(self._fit_source(plan, reader, source, merged, kind))
            self._tell("features", source.name, i + 1, len(self.sources))
        return found

    def _fit_source(
        self, plan: Plan, reader: DeltaReader, source: TaskSource, merged: Checkpoint, kind: MapKind
    ) -> TaskMap:
        """Fits one task's map: one module is the fine-tune, then the base, and then the merged model."""
        section = self.section
        module = self._finetune(plan, reader, source, merged.tensors)
        task = self._task(source, module)
        names = source.names(module, merged.tensors)
        b = read_features(module, task)
        in_base = {tensor.name for tensor in plan.tensors if tensor.in_base}
        fill(module, {name: inner for name, inner in names.items() if name in in_base}, reader.base)
        control = read_features(module, task)
        fill(module, names, merged.read)
        a = read_features(module, task)
        return fit_task(
            task,
            a,
            b,
            control,
            kind=kind,
            ridge=section.ridge,
            held_out=section.held_out,
            device=self.compute.device,
        )

    def _task(self, source: TaskSource, module: torch.nn.Module) -> AlignmentTask:
        """Returns a task's batches, reader and head, made once from its fine-tune's module."""
        if source.name not in self._tasks:
            self._tasks[source.name] = source.task(module, self.section)
        return self._tasks[source.name]

    def _finetune(
        self, plan: Plan, reader: DeltaReader, source: TaskSource, known: Iterable[str]
    ) -> torch.nn.Module:
        """Returns the fine-tune of a task in a new module."""
        device = self.compute.device
        module = source.module(device)
        if source.adapter is not None:
            tensors = {tensor.name: tensor for tensor in plan.tensors if tensor.in_base}
            names = source.names(module, known)
            fill(
                module,
                {name: inner for name, inner in names.items() if name in tensors},
                lambda name: updated_weight(reader, tensors[name], source.t, device),
            )
        return module

    def _finetunes(self, plan: Plan, reader: DeltaReader, known: Iterable[str]) -> Iterator[Model]:
        """Yields every task's fine-tune, one in memory at a time."""
        for source in self.sources:
            yield Model(self._finetune(plan, reader, source, known))

    def _learned(self, folder: Path, state: str | Path | None) -> AlignResult:
        """Learns λ (and rotations), then merges again with the result."""
        scratch = folder.with_name("start")
        first = self._merge(make_plan(_changed(self.recipe, out_dtype="float32")), scratch)
        with closing(make_plan(self.recipe)) as plan, open_checkpoint(scratch) as merged:
            fits = None
            if self.section.method == "learned" and self.section.start != "identity":
                fits = self._fit(plan, merged, self.section.start)
            found, names = self._learn(plan, merged, first, fits, state)
        shutil.rmtree(scratch)
        if not self.compute.on_cpu:
            torch.cuda.empty_cache()  # the merge counts the memory that is free
        learned = {name: found.scales[inner] for name, inner in names.items() if inner in found.scales}
        result = self._merge(_with_scales(make_plan(self.recipe), learned), folder)
        notes = [*self.notes, *result.notes] + ([] if found.stopped is None else [found.stopped])
        if found.best_step < found.steps:
            notes.append(
                f"the state after {found.best_step} of {found.steps} steps was kept: its predictions agree "
                "most with those of the fine-tunes"
            )
        heads = {source.name: head for source, head in zip(self.sources, found.heads, strict=True)}
        method, ran = self.section.method, self.compute.on_first().to_dict()
        return AlignResult(folder, method, result, heads, fits, found, ran, notes)

    def _learn(
        self,
        plan: Plan,
        merged: Checkpoint,
        first: MergeResult,
        fits: list[TaskMap] | None,
        state: str | Path | None,
    ) -> tuple[Learned, dict[str, str]]:
        """Learns on the device; returns the result on the CPU, and the module's names by those of the merge.

        The base is in the module, whose weights are read in place; the updates are read one at a time.
        """
        section, device, reader = self.section, self.compute.device, DeltaReader.of(plan)
        for source in self.sources:
            if source.name not in self._tasks:
                self._task(source, source.module(device))
        tasks = [self._tasks[source.name] for source in self.sources]
        module = self.sources[0].module(device)
        names = self.sources[0].names(module, merged.tensors)
        start = {r.name: r.scale for r in first.records if r.scale and r.name in names}
        updated = {t.name: t for t in plan.tensors if t.rule == "merge" and t.name in start}
        fill(module, names, lambda name: (reader.base if name in updated else merged.read)(name))

        def read(tensor: TensorPlan) -> list[Delta]:
            if section.method == "adamerging":
                return weighted_deltas(reader, tensor, device)
            value, base = (wide(read(tensor.name), device) for read in (merged.read, reader.base))
            return [(value - base) / start[tensor.name]]

        def report(value: LearnProgress) -> None:
            self._tell("learn", f"loss {value.loss:.4f}", value.step, value.steps)

        model = Model(module)
        updates = UpdateReader({names[name]: tensor for name, tensor in updated.items()}, read)
        scales = {names[name]: start[name] for name in updated}
        given: dict[str, Any] = {
            "own": self._finetunes(plan, reader, list(merged.tensors)),
            "state": state,
            "progress": report,
        }
        if section.method == "adamerging":
            scale = next(iter(scales.values()))
            found = adamerging(model, updates, tasks, section.learn, scale=scale, **given)
        else:
            maps = None if fits is None else [fit.matrix for fit in fits]
            found = learn(model, updates, tasks, section.learn, scale=scales, maps=maps, **given)
        found.model = absorb(found.model)
        found.matrices = [None if matrix is None else matrix.cpu() for matrix in found.matrices]
        return found, names


def _changed(recipe: Recipe, **update: Any) -> Recipe:
    """Returns the recipe with some fields replaced; messages and manifest still show the user's text."""
    changed = recipe.model_copy(update=update)
    changed._plain, changed._origin, changed._file = recipe._plain, recipe._origin, recipe._file
    return changed


def _with_scales(plan: Plan, scales: Mapping[str, Sequence[float]]) -> Plan:
    """Returns the plan with the learned λ: one per tensor as scale, one per fine-tune as weights."""
    for i, tensor in enumerate(plan.tensors):
        values = scales.get(tensor.name)
        if values is None:
            continue
        if len(values) == 1:
            plan.tensors[i] = replace(tensor, scale=values[0], aligned=False)
        else:
            pairs = zip(tensor.sources, values, strict=True)
            sources = tuple(replace(source, weight=source.weight * value) for source, value in pairs)
            plan.tensors[i] = replace(tensor, scale=1.0, sources=sources, aligned=False)
    plan.scale = ScalePlan(Setting(((None, 1.0),)), None, "model", "learned without labels")
    return plan
