"""One run of `dirmerge.align`: merges, reads features, fits or learns maps, and merges again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirmerge.alignment.features import last_linear
from dirmerge.alignment.heads import FOLDER
from dirmerge.alignment.learned import LearnProgress
from dirmerge.alignment.learning import adamerging, learn
from dirmerge.alignment.maps import MapKind, TaskMap, fit_task
from dirmerge.alignment.model import Model, read_features
from dirmerge.alignment.result import AlignProgress, AlignResult
from dirmerge.alignment.sources import TaskSource, open_sources
from dirmerge.checkpoints.reader import open_checkpoint
from dirmerge.deltas.lowrank import LowRank
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
        self.sources = open_sources(recipe, section)
        paths = {last_linear(s.module(empty=True)) for s in self.sources if s.section.head is None}
        self.notes += [f"{path}: every task keeps its own, in {FOLDER}/" for path in sorted(paths)]
        rules = tuple(TensorRule(match=(f"{path}.*", f"*.{path}.*"), rule="drop") for path in sorted(paths))
        self.recipe = _changed(recipe, tensors=(*rules, *recipe.tensors)) if rules else recipe

    def run(self, folder: Path, state: str | Path | None) -> AlignResult:
        """Merges into `folder` and aligns the features of every task."""
        method = self.section.method
        if method in ("learned", "adamerging"):
            return self._learned(folder, state)
        merged = self._merge(make_plan(self.recipe), folder)
        with open_checkpoint(folder) as checkpoint:
            weights = {name: _wide(checkpoint.read(name)) for name in checkpoint.tensors}
        plan = make_plan(self.recipe)
        fits = self._fit(plan, weights, "rotation" if method == "rotation" else "ridge")
        plan.close()
        heads = {fit.name: fit.head for fit in fits}
        return AlignResult(folder, method, merged, heads, fits, None, [*self.notes, *merged.notes])

    def _merge(self, plan: Plan, folder: Path | None) -> MergeResult:
        def step(value: Progress) -> None:
            self._tell("merge", value.name, value.done, value.total)

        return pipeline.run(plan, folder, progress=step, compute=self.compute)

    def _tell(self, phase: str, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(AlignProgress(phase, name, done, total))

    def _fit(self, plan: Plan, weights: Mapping[str, Tensor], kind: MapKind) -> list[TaskMap]:
        """Fits every task's map, one fine-tune in memory at a time."""
        reader = DeltaReader.of(plan)
        base = _base_weights(reader, plan)
        section, found = self.section, []
        for i, source in enumerate(self.sources):
            own = self._own(plan, reader, source, weights, base)
            module = own.module
            task = source.task(module, section)
            names = source.names(module, weights)
            models = [
                Model(module, {inner: values[name] for name, inner in names.items() if name in values})
                for values in (weights, base)
            ]
            a, control = (read_features(model, task) for model in models)
            b = read_features(own, task)
            found.append(
                fit_task(task, a, b, control, kind=kind, ridge=section.ridge, held_out=section.held_out)
            )
            self._tell("features", task.name, i + 1, len(self.sources))
        return found

    def _own(
        self,
        plan: Plan,
        reader: DeltaReader,
        source: TaskSource,
        weights: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
    ) -> Model:
        """Returns the fine-tune of a task in a new module."""
        module = source.module()
        if source.adapter is None:
            return Model(module)
        names = source.names(module, weights)
        values = {name: base[name] for name in names if name in base}
        for tensor in plan.tensors:
            delta = reader.delta(tensor, source.t) if tensor.name in names else None
            if delta is not None:
                dense = delta.dense() if isinstance(delta, LowRank) else delta
                values[tensor.name] = values[tensor.name] + dense
        return Model(module, {names[name]: value for name, value in values.items()})

    def _finetunes(self, plan: Plan, weights: Mapping[str, Tensor]) -> Iterator[Model]:
        """Yields every task's fine-tune, one in memory at a time."""
        reader = DeltaReader.of(plan)
        base = _base_weights(reader, plan)
        for source in self.sources:
            yield self._own(plan, reader, source, weights, base)

    def _learned(self, folder: Path, state: str | Path | None) -> AlignResult:
        """Learns λ (and rotations), then merges again with the result."""
        section = self.section
        first = self._merge(make_plan(_changed(self.recipe, out_dtype="float32")), None)
        assert first.state_dict is not None  # merged in memory
        fixed = {name: _wide(value) for name, value in first.state_dict.items()}
        plan = make_plan(self.recipe)
        reader = DeltaReader.of(plan)
        fits = None
        if section.method == "learned" and section.start != "identity":
            fits = self._fit(plan, fixed, section.start)
        module = self.sources[0].module()
        tasks = []
        for source in self.sources:
            own = module if source is self.sources[0] else source.module()
            tasks.append(source.task(own, section))
            del own
        names = self.sources[0].names(module, fixed)
        start = {r.name: r.scale for r in first.records if r.scale and r.name in names}
        updates: dict[str, list[Delta]] = {}
        for tensor in plan.tensors:
            scale = start.get(tensor.name)
            if tensor.rule != "merge" or scale is None:
                continue
            merged, base = fixed[tensor.name], _wide(reader.base(tensor.name))
            fixed[tensor.name] = base
            updates[tensor.name] = [(merged - base) / scale]
            if section.method == "adamerging":
                updates[tensor.name] = _deltas(reader, tensor)
        model = Model(module, {inner: fixed[name] for name, inner in names.items()})
        inside = {names[name]: parts for name, parts in updates.items()}
        scales = {names[name]: start[name] for name in updates}

        def report(value: LearnProgress) -> None:
            self._tell("learn", f"loss {value.loss:.4f}", value.step, value.steps)

        options, own_models = section.learn, self._finetunes(plan, fixed)
        if section.method == "adamerging":
            common = next(iter(scales.values()))
            found = adamerging(
                model, inside, tasks, options, scale=common, own=own_models, state=state, progress=report
            )
        else:
            maps = None if fits is None else [fit.matrix for fit in fits]
            found = learn(
                model,
                inside,
                tasks,
                options,
                scale=scales,
                maps=maps,
                own=own_models,
                state=state,
                progress=report,
            )
        plan.close()
        learned = {name: found.scales[names[name]] for name in updates}
        result = self._merge(_with_scales(make_plan(self.recipe), learned), folder)
        notes = [*self.notes, *result.notes] + ([] if found.stopped is None else [found.stopped])
        if found.best_step < found.steps:
            notes.append(
                f"the state after {found.best_step} of {found.steps} steps was kept: its predictions agree "
                "most with those of the fine-tunes"
            )
        heads = {task.name: head for task, head in zip(tasks, found.heads, strict=True)}
        return AlignResult(folder, section.method, result, heads, fits, found, notes)


def _changed(recipe: Recipe, **update: Any) -> Recipe:
    """Returns the recipe with some fields replaced; messages and manifest still show the user's text."""
    changed = recipe.model_copy(update=update)
    changed._plain, changed._origin, changed._file = recipe._plain, recipe._origin, recipe._file
    return changed


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _base_weights(reader: DeltaReader, plan: Plan) -> dict[str, Tensor]:
    return {tensor.name: _wide(reader.base(tensor.name)) for tensor in plan.tensors if tensor.in_base}


def _deltas(reader: DeltaReader, tensor: TensorPlan) -> list[Delta]:
    """Returns the deltas of all fine-tunes, times their weights in the recipe."""
    found: list[Delta] = []
    for source in tensor.sources:
        delta = reader.delta(tensor, source.task)
        if delta is None:
            found.append(torch.zeros(tensor.shape))
        elif isinstance(delta, LowRank):
            found.append(delta.scaled(source.weight))
        else:
            found.append(delta * source.weight)
    return found


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
