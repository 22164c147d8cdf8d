"""Plans a merge from headers alone: opens the inputs, decides tensor by tensor, lists what does not fit.

Everything that does not fit together is found here, before a weight is read, and listed in one MismatchError
with the line of the recipe that resolves it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from dirmerge.checkpoints.adapters import Adapter, is_adapter, open_adapter
from dirmerge.checkpoints.names import common_prefix, is_expert_stack, is_table, layer_depths
from dirmerge.checkpoints.plan import Input, Plan, Rule, ScalePlan, Source, TensorPlan
from dirmerge.checkpoints.problems import Problems
from dirmerge.checkpoints.reader import Checkpoint, open_checkpoint, resolve
from dirmerge.checkpoints.safetensors_io import TensorInfo
from dirmerge.errors import MismatchError, RecipeError
from dirmerge.linalg import seed_for
from dirmerge.methods import Method, get_method
from dirmerge.recipe import ModelRef, Recipe, Setting, TensorRule


def make_plan(recipe: Recipe, as_adapter: bool = False, rank: int | None = None) -> Plan:
    """Plan the merge from the headers of all inputs.

    Args:
        recipe: the recipe.
        as_adapter: write a PEFT adapter instead of a model; all models must be adapters.
        rank: rank of the adapter written; by default Σ r_t.

    Returns:
        The plan, with its inputs open.

    Raises:
        RecipeError: options the method refuses, or a recipe that cannot give the output asked for.
        CheckpointError: an input that cannot be read.
        MismatchError: inputs that do not fit together: all problems with the rule that resolves each.
    """
    method = get_method(recipe.method)
    rank = rank if rank is not None else recipe.adapter_rank
    if rank is not None and not as_adapter:
        raise RecipeError(
            f"{recipe.origin}: adapter_rank only has a meaning when an adapter is written (--as adapter)"
        )
    if rank is not None and rank < 1:
        raise RecipeError(f"{recipe.origin}: adapter_rank must be at least 1, got {rank}")
    inputs = _open_inputs(recipe, as_adapter)
    try:
        return _Planner(recipe, method, as_adapter, rank, *inputs).plan()
    except BaseException:
        for item in (inputs[0], *inputs[1]):
            if item is not None and item.checkpoint is not None:
                item.checkpoint.close()
        raise


def _open_inputs(recipe: Recipe, as_adapter: bool) -> tuple[Input | None, list[Input]]:
    reference = recipe.base
    base_path: Path | None = None
    base: Input | None = None
    if reference is not None:
        base = _open_base(recipe, reference)
        base_path = base.checkpoint.path if base.checkpoint is not None else None
    tasks = []
    for i, entry in enumerate(recipe.models):
        if all(entry is not task for task in recipe.tasks()):
            continue
        tasks.append(_open_task(entry.model, f"models[{i}]", base_path))
        if as_adapter and not tasks[-1].adapter_only:
            raise RecipeError(
                f"{recipe.origin}: models[{i}].model: {entry.model.label} is a full model, and an adapter "
                "can only be made from adapters; leave out --as adapter"
            )
    if base is None and not as_adapter:
        names = sorted({task.adapter.base_name for task in tasks if task.adapter and task.adapter.base_name})
        hint = f" (the adapters name {', '.join(names)})" if names else ""
        or_adapter = ", or write an adapter with --as adapter" if all(t.adapter_only for t in tasks) else ""
        raise RecipeError(f"{recipe.origin}: base_model is missing: give it{hint}{or_adapter}")
    return base, tasks


def _open_base(recipe: Recipe, reference: ModelRef) -> Input:
    if reference.adapter is not None:
        raise RecipeError(
            f"{recipe.origin}: base_model: {reference.label} names an adapter on top of a model; merge the "
            "adapter into the model first and give the result as base_model"
        )
    if isinstance(reference.source, str):
        path = resolve(reference.source)
        if is_adapter(path):
            raise RecipeError(
                f"{recipe.origin}: base_model: {reference.label} is an adapter, give the model it is for"
            )
        return Input(reference.label, "model", open_checkpoint(path))
    return Input("base_model", "state dict", open_checkpoint(reference.source))


def _open_task(reference: ModelRef, place: str, base_path: Path | None) -> Input:
    if not isinstance(reference.source, str):
        return Input(place, "state dict", open_checkpoint(reference.source))
    path = resolve(reference.source)
    if reference.adapter is None:
        if is_adapter(path):
            return Input(reference.label, "adapter", adapter=open_adapter(path))
        return Input(reference.label, "model", open_checkpoint(path))
    adapter = open_adapter(resolve(reference.adapter))
    if base_path is not None and path.resolve() == base_path.resolve():
        return Input(reference.label, "adapter", adapter=adapter)
    return Input(reference.label, "model + adapter", open_checkpoint(path), adapter)


class _Planner:
    """Decides tensor by tensor; collects problems instead of stopping at the first."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        as_adapter: bool,
        rank: int | None,
        base: Input | None,
        tasks: list[Input],
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.as_adapter = as_adapter
        self.rank = rank
        self.base = base
        self.tasks = tasks
        self.adapters_only = all(task.adapter_only for task in tasks)
        checkpoint = base.checkpoint if base is not None else None
        self.config = checkpoint.config if checkpoint is not None else None
        self.base_tensors: Mapping[str, TensorInfo] = checkpoint.tensors if checkpoint is not None else {}
        self.problems = Problems()
        self.notes: list[str] = []
        self.used_rules: set[int] = set()
        self.checked_options: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.option_problems: dict[str, None] = {}

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            RecipeError: options or weights that the method refuses.
            MismatchError: everything that does not fit together.
        """
        self._map_names()
        scale = self._scale()
        names = self._names()
        depths = layer_depths(names)
        tensors = [
            planned for name in names if (planned := self._tensor(name, depths[name], scale)) is not None
        ]
        self._check_rules(names)
        if self.option_problems:
            raise RecipeError(f"{self.recipe.origin}: " + "; ".join(self.option_problems))
        self.problems.raise_if_any(self.recipe.origin, names)
        if self.as_adapter and not any(tensor.written for tensor in tensors):
            raise MismatchError(f"{self.recipe.origin}: no module is left for the adapter")
        output: Literal["model", "adapter"] = "adapter" if self.as_adapter else "model"
        return Plan(self.recipe, self.method, output, self.base, self.tasks, tensors, scale, self.notes)

    def _map_names(self) -> None:
        """Find, for every input, the base's names of its tensors."""
        if self.base is not None and self.base.checkpoint is not None:
            self.base.tensors = {name: name for name in self.base_tensors}
            self.base.tied = _tied_names(self.base.checkpoint)
            for names in self.base.checkpoint.tied:
                self.notes.append(f"base: {', '.join(names)} are tied: one tensor, written once")
        for task in self.tasks:
            if task.checkpoint is not None:
                self._map_checkpoint(task, task.checkpoint, self.base_tensors.keys())
            if task.adapter is not None:
                self._map_adapter(task, task.adapter)

    def _map_checkpoint(self, task: Input, checkpoint: Checkpoint, base_names: Collection[str]) -> None:
        own = checkpoint.tensors.keys()
        strip, add = "", ""
        if base_names and not any(name in base_names for name in own):
            # All of the base is inside the fine-tune (bert.encoder… for encoder…), or the other way round.
            inside = common_prefix(base_names, own)
            outside = common_prefix(own, base_names)
            if inside is not None:
                add, strip = inside  # base name = add + own name without strip
            elif outside is not None:
                strip, add = outside
            if strip or add:
                self.notes.append(
                    f"{task.label}: {_prefix_note(strip, add)} its tensors' names to match the base's"
                )
        task.tensors = {add + name[len(strip) :] if name.startswith(strip) else name: name for name in own}
        task.tied = _tied_names(checkpoint)

    def _map_adapter(self, task: Input, adapter: Adapter) -> None:
        weights = {target.name: module for module, target in adapter.targets.items()}
        prefix: tuple[str, str] | None = ("", "")
        if self.base_tensors:
            prefix = common_prefix(weights.keys(), self.base_tensors.keys())
        strip, add = prefix if prefix is not None else ("", "")
        if strip or add:
            self.notes.append(
                f"{task.label}: {_prefix_note(strip, add)} its modules' names to match the base's"
            )

        def rename(name: str) -> str:
            return add + name[len(strip) :] if name.startswith(strip) else name

        task.modules = {rename(name): module for name, module in weights.items()}
        task.saved = {rename(name): name for name in adapter.saved}
        shapes = {name: info.shape for name, info in self.base_tensors.items()}
        try:
            oriented = adapter.orient(
                {name: shapes[rename(name)] for name in weights if rename(name) in shapes}
            )
        except MismatchError as error:
            self.problems.general.append(str(error))
            return
        copies = {rename(name): info for name, info in adapter.base_copies.items()}
        task.adapter = replace(oriented, base_copies=copies)

    def _names(self) -> list[str]:
        """Return the names of all tensors, the base's first, in a fixed order."""
        names: dict[str, None] = {}
        for item in ([] if self.as_adapter else [self.base]) + self.tasks:
            if item is not None:
                for mapping in (item.tensors, item.modules, item.saved):
                    names.update(dict.fromkeys(mapping))
        return list(names)

    def _scale(self) -> ScalePlan:
        recipe = self.recipe
        if recipe.scale is not None:
            origin = "mergekit's linear" if recipe.merge_method == "linear" else "recipe"
            return ScalePlan(recipe.scale, None, "model", origin)
        if recipe.alignment is not None:
            return ScalePlan(None, recipe.alignment, recipe.alignment_per, "recipe")
        count = max(1, recipe.present())
        default = self.method.default_scale(self.adapters_only, count)
        kind = "adapters" if self.adapters_only else "full fine-tunes"
        origin = f"default of {self.method.name} for {kind}, T = {count}"
        if default.value is not None:
            return ScalePlan(Setting(((None, default.value),)), None, "model", origin)
        return ScalePlan(None, default.alignment, recipe.alignment_per, origin)

    def _options(self, name: str, depth: float, adapters: bool) -> dict[str, Any]:
        given = self.recipe.options(name, depth)
        key = (adapters, *sorted(given.items(), key=lambda item: item[0]))
        if key not in self.checked_options:
            try:
                self.checked_options[key] = self.method.validate(given, adapters=adapters)
            except ValueError as error:
                self.option_problems[f"parameters: {error}"] = None
                self.checked_options[key] = {}
        return self.checked_options[key]

    def _tensor(self, name: str, depth: float, scale: ScalePlan) -> TensorPlan | None:
        index, rule = next(
            ((i, rule) for i, rule in enumerate(self.recipe.tensors) if rule.matches(name)), (None, None)
        )
        if index is not None:
            self.used_rules.add(index)
        why = None if index is None else f"tensors[{index}]"
        if self.as_adapter:
            shape, dtype = self._adapter_shape(name)
            in_base = False
        else:
            info = self.base_tensors.get(name)
            in_base = info is not None
            if info is None:
                shape, dtype = self._extra_shape(name)
            else:
                shape, dtype = tuple(info.shape), info.dtype
        out_dtype = dtype
        if dtype.is_floating_point and self.recipe.output_dtype is not None:
            out_dtype = self.recipe.output_dtype
        draft = TensorPlan(
            name, shape, out_dtype, "base", why or "", in_base=in_base, seed=seed_for(name, self.recipe.seed)
        )
        if self.as_adapter:
            draft = replace(draft, module=self._module(name))
        tied_to = self._tied_to(name, in_base)
        if tied_to is not None and rule is None:
            return self._tied(draft, tied_to)
        chosen = rule.rule if rule is not None else None
        if chosen == "drop":
            return replace(draft, rule="drop")
        if chosen == "base":
            if self.as_adapter:
                return replace(draft, rule="drop", notes=("the base's own weight stays",))
            if in_base:
                return replace(draft, rule="base")
            self.problems.add(name, "the base has no such tensor to copy", "drop", "take")
            return None
        if rule is not None and chosen == "take":
            return self._take(draft, rule)
        return self._combined(draft, chosen, why, depth, dtype, scale)

    def _combined(
        self,
        draft: TensorPlan,
        chosen: str | None,
        why: str | None,
        depth: float,
        dtype: torch.dtype,
        scale: ScalePlan,
    ) -> TensorPlan | None:
        name, shape = draft.name, draft.shape
        weights = self.recipe.weights(name, depth)
        sources: list[Source] = []
        absent: list[int] = []
        other_shape: list[tuple[int, tuple[int, ...]]] = []
        for t in range(len(self.tasks)):
            source, own_shape = self._source(name, t, weights[t])
            if source is None:
                absent.append(t)
            elif own_shape != shape:
                other_shape.append((t, own_shape))
            else:
                if source.dtype is not None and source.dtype.is_floating_point != dtype.is_floating_point:
                    self.problems.add(
                        name,
                        f"is {_dtype_name(source.dtype)} in {self.tasks[t].label}, "
                        f"{_dtype_name(dtype)} elsewhere",
                        "base",
                        "drop",
                    )
                    return None
                sources.append(source)
        if len(absent) == len(self.tasks):
            if not dtype.is_floating_point:
                return replace(draft, rule="identical", why="integers: the base's, no model has them")
            if self.adapters_only:
                return replace(draft, rule="base", why="no adapter changes it")
            if chosen == "present":
                return replace(draft, rule="base", why=f"{why}: present, no model has it")
            self._missing(name, absent)
            return None
        if not dtype.is_floating_point:
            return self._integers(draft, chosen, sources, absent, other_shape)
        if chosen == "common_rows":
            if absent:
                self._missing(name, absent)
                return None
            return self._common_rows(draft, sources, weights, other_shape)
        if other_shape:
            self._shape_problem(draft, other_shape)
            return None
        notes: list[str] = []
        if absent and chosen != "present":
            if not self._unchanged_by_adapters(name, absent):
                if draft.in_base or self.as_adapter:
                    self._missing(name, absent)
                else:
                    self._extra(name, sources)
                return None
            sources = sorted([*sources, *(Source(t, weights[t]) for t in absent)], key=lambda s: s.task)
            notes.append("adapters leave it unchanged: their delta is 0")
        elif absent:
            labels = ", ".join(self.tasks[t].label for t in absent)
            notes.append(f"without {labels}, which lack it")
        elif not draft.in_base and not self.as_adapter and chosen is None:
            self._extra(name, sources)
            return None
        draft = replace(draft, sources=tuple(sources), notes=tuple(notes))
        if draft.numel == 0 and draft.in_base:
            return replace(draft, rule="base", why="it has no entries", sources=())
        if self.as_adapter and not self._fits_adapter(draft):
            return None
        if all(source.weight == 0 for source in sources):
            if not draft.in_base:
                self.problems.add(name, "all weights are 0 and there is no base to fall back on", "drop")
                return None
            return replace(draft, rule="base", why="all weights are 0 here", sources=())
        return self._merge_or_mean(draft, chosen, why, depth, scale)

    def _merge_or_mean(
        self, draft: TensorPlan, chosen: str | None, why: str | None, depth: float, scale: ScalePlan
    ) -> TensorPlan | None:
        name, shape = draft.name, draft.shape
        rule, reason = self._default_rule(draft)
        if chosen in ("merge", "mean"):
            rule, reason = chosen, why or ""  # type: ignore[assignment]
        elif chosen == "present":
            reason = f"{why}: present, {reason}"
        if rule == "mean":
            if sum(source.weight for source in draft.sources) == 0:
                self.problems.add(name, "the weights of its mean sum to 0", "base")
                return None
            flops = 3.0 * draft.numel * len(draft.sources)
            planned = replace(draft, rule="mean", why=reason, flops=flops, peak_bytes=_mean_bytes(draft))
            return self._adapter_module(planned)
        if not draft.in_base and not self.as_adapter:
            self.problems.add(
                name, "the base has no such tensor, so it has no delta to merge", "mean", "drop", "take"
            )
            return None
        if not self.method.elementwise and (len(shape) not in (2, 3) or 0 in shape):
            self.problems.add(
                name, f"has shape {list(shape)}, and {self.method.name} merges matrices", "mean", "base"
            )
            return None
        low_rank = all(source.rank is not None for source in draft.sources)
        options = self._options(name, depth, low_rank)
        try:
            self.method.check_weights([source.weight for source in draft.sources])
        except ValueError as error:
            self.option_problems[f"models[…].parameters.weight: {error}"] = None
            return None
        value = None if scale.value is None else scale.value.at(name, depth)
        if scale.alignment is None and value is None:
            self.option_problems[f"scale: has no value for {name}; add an item without filter"] = None
            return None
        matrix, slices = _as_matrix(shape, self.method.elementwise)
        active = [source for source in draft.sources if source.weight != 0]
        ranks = [source.rank for source in active]
        flops, peak, rank = self.method.cost(matrix, len(active), ranks, {**self.method.options, **options})
        loaded = max(
            (source.dtype.itemsize for source in draft.sources if source.dtype is not None), default=0
        )
        peak += math.prod(matrix) * (loaded + 2 * draft.dtype.itemsize)
        return self._adapter_module(
            replace(
                draft,
                rule="merge",
                why=reason,
                options=options,
                scale=None if value is None else float(value),
                aligned=len(shape) >= 2 and min(matrix) > 1 and is_table(name, shape, self.config) is None,
                rank=rank,
                slices=slices,
                flops=flops * (slices or 1),
                peak_bytes=peak,
            )
        )

    def _default_rule(self, draft: TensorPlan) -> tuple[Rule, str]:
        name, shape = draft.name, draft.shape
        if not draft.in_base and not self.as_adapter:
            return "mean", "mean of values: not in the base"
        if self.as_adapter and draft.module is None:
            return "mean", "mean of values: saved beside the adapters"
        if self.method.elementwise:
            return "merge", f"{self.method.name} takes tensors of any shape"
        table = is_table(name, shape, self.config)
        if table is not None:
            return "mean", table
        if len(shape) == 2 and min(shape) > 1:
            return "merge", "default for matrices"
        if is_expert_stack(name, shape):
            return "merge", "default for stacked experts: each matrix by itself"
        kind = {
            0: "scalars",
            1: "vectors",
            2: "matrices of one row or column",
            3: "3-D tensors that hold no experts",
        }
        return "mean", f"default for {kind.get(len(shape), 'kernels')}"

    def _source(self, name: str, t: int, weight: float) -> tuple[Source | None, tuple[int, ...]]:
        """Return what fine-tune t has for a tensor, and in which shape; (None, ()) if it has nothing."""
        task = self.tasks[t]
        saved, module, tensor = task.saved.get(name), task.modules.get(name), task.tensors.get(name)
        if saved is not None and task.adapter is not None:
            info = task.adapter.saved[saved]
            return Source(t, weight, saved=saved, dtype=info.dtype), tuple(info.shape)
        target = task.adapter.targets[module] if task.adapter is not None and module is not None else None
        if tensor is not None and task.checkpoint is not None:
            info = task.checkpoint.tensors[tensor]
            if target is not None and tuple(target.shape) != tuple(info.shape):
                self.problems.add(
                    name,
                    f"is {list(info.shape)} in {task.label} and {list(target.shape)} in its adapter",
                    "base",
                    "drop",
                )
            return Source(t, weight, tensor=tensor, module=module, dtype=info.dtype), tuple(info.shape)
        if target is not None:
            return Source(t, weight, module=module, rank=target.rank), tuple(target.shape)
        return None, ()

    def _unchanged_by_adapters(self, name: str, absent: Sequence[int]) -> bool:
        """Whether the tensor is one that full models change and no adapter does, beside adapters."""
        if self.adapters_only or not all(self.tasks[t].adapter_only for t in absent):
            return False
        touched = any(name in task.modules or name in task.saved for task in self.tasks if task.adapter_only)
        return not touched and name in self.base_tensors

    def _tied_to(self, name: str, in_base: bool) -> str | None:
        """Return the base's tensor that `name` is another name of."""
        base = self.base
        if base is None or self.as_adapter:
            return None
        if in_base:
            return base.tied.get(name)
        for task in self.tasks:
            own = task.tensors.get(name)
            if own is not None and own in task.tied:
                names = {other: mine for mine, other in task.tensors.items()}
                target = names.get(task.tied[own])
                if target is not None and target in base.tensors:
                    return target
        return None

    def _tied(self, draft: TensorPlan, tied_to: str) -> TensorPlan:
        sources = [
            Source(t, 1.0, tensor=task.tensors[draft.name])
            for t, task in enumerate(self.tasks)
            if draft.name in task.tensors and tied_to in task.tensors
        ]
        note = f"equals {tied_to}, which is checked when it is read"
        adapted = [
            task.label for task in self.tasks if draft.name in task.modules or draft.name in task.saved
        ]
        if adapted:
            self.problems.add(
                draft.name,
                f"is tied to {tied_to} in the base, and {', '.join(adapted)} change it alone",
                "drop",
            )
        return replace(
            draft, rule="tied", why="tied weights", tied_to=tied_to, sources=tuple(sources), notes=(note,)
        )

    def _take(self, draft: TensorPlan, rule: TensorRule) -> TensorPlan | None:
        entries = list(self.recipe.models)
        index = (
            rule.model
            if isinstance(rule.model, int)
            else [e.model.label for e in entries].index(rule.model or "")
        )
        entry = entries[index]
        tasks = self.recipe.tasks()
        t = next((i for i, task in enumerate(tasks) if task is entry), None)
        if t is None:  # the base, listed among the models
            return replace(draft, rule="base")
        source, shape = self._source(draft.name, t, 1.0)
        if not draft.in_base and not self.as_adapter:
            note = "tensors that the base lacks are written beside its config.json: check that it fits"
            self.notes += [note] if note not in self.notes else []
        if source is None:
            self.problems.add(draft.name, f"{self.tasks[t].label} has no such tensor to take", "base", "drop")
            return None
        notes = (
            ()
            if shape == draft.shape
            else (f"shape {list(shape)} instead of the base's {list(draft.shape)}",)
        )
        if source.module is not None and not self.as_adapter and not draft.in_base:
            self.problems.add(draft.name, "the base has no such weight for the adapter to change", "drop")
            return None
        planned = replace(
            draft,
            rule="take",
            shape=shape,
            sources=(source,),
            rank=source.rank if self.as_adapter else None,
            notes=notes,
            peak_bytes=_mean_bytes(draft),
        )
        return self._adapter_module(planned)

    def _integers(
        self,
        draft: TensorPlan,
        chosen: str | None,
        sources: list[Source],
        absent: list[int],
        other_shape: list[tuple[int, tuple[int, ...]]],
    ) -> TensorPlan | None:
        if chosen in ("merge", "mean", "common_rows"):
            self.problems.add(
                draft.name, f"is {_dtype_name(draft.dtype)}: there is no mean of integers", "base"
            )
            return None
        if other_shape:
            self._shape_problem(draft, other_shape)
            return None
        if not draft.in_base and chosen != "present":
            self._extra(draft.name, sources)
            return None
        notes: tuple[str, ...] = ()
        if absent:
            notes = (f"{', '.join(self.tasks[t].label for t in absent)} lack it",)
        return replace(
            draft, rule="identical", why="integers must agree", sources=tuple(sources), notes=notes
        )

    def _common_rows(
        self,
        draft: TensorPlan,
        sources: list[Source],
        weights: list[float],
        other_shape: list[tuple[int, tuple[int, ...]]],
    ) -> TensorPlan | None:
        rows = draft.shape[0] if draft.shape else 0
        notes = []
        if sum(weights) == 0:
            self.problems.add(draft.name, "the weights of its mean sum to 0", "base")
            return None
        for t, shape in other_shape:
            if not shape or not draft.shape or shape[1:] != draft.shape[1:]:
                self._shape_problem(draft, other_shape)
                return None
            source, _ = self._source(draft.name, t, weights[t])
            assert source is not None
            sources.append(source)
            rows = min(rows, shape[0])
            if shape[0] > draft.shape[0]:
                notes.append(
                    f"rows {draft.shape[0]}:{shape[0]} of {self.tasks[t].label} have no place in the base"
                )
        if rows < draft.shape[0]:
            notes.append(f"rows {rows}:{draft.shape[0]} are the base's")
        return replace(
            draft,
            rule="common_rows",
            sources=tuple(sorted(sources, key=lambda source: source.task)),
            rows=rows,
            notes=tuple(notes),
            flops=3.0 * draft.numel * len(self.tasks),
            peak_bytes=_mean_bytes(draft),
        )

    @cached_property
    def _factor_dtype(self) -> torch.dtype:
        """Return the widest dtype in which a factor is stored: an adapter file gets one for all modules."""
        targets = [t for task in self.tasks if task.adapter for t in task.adapter.targets.values()]
        return _widest([info.dtype for target in targets for info in (target.a, target.b)])

    def _module(self, name: str) -> str | None:
        return next((task.modules[name] for task in self.tasks if name in task.modules), None)

    def _adapter_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        dtypes = []
        shape: tuple[int, ...] = ()
        for t, task in enumerate(self.tasks):
            source, own = self._source(name, t, 1.0)
            if source is not None and task.adapter is not None:
                shape = shape or own
                dtypes.append(source.dtype or self._factor_dtype)
        return shape, _widest(dtypes)

    def _fits_adapter(self, draft: TensorPlan) -> bool:
        """Whether PEFT can store the tensor: as low-rank updates of all adapters, or in full beside them."""
        full = [self.tasks[s.task].label for s in draft.sources if s.saved is not None]
        if draft.module is not None and full:
            self.problems.add(
                draft.name, f"is a full tensor in {', '.join(full)} and an update elsewhere", "drop"
            )
            return False
        module, _, leaf = draft.name.rpartition(".")
        updated = any(f"{module}.weight" in task.modules for task in self.tasks)
        if full and (not module or (updated and leaf != "bias")):
            self.problems.add(draft.name, "cannot be stored in a PEFT adapter beside the updates", "drop")
            return False
        return True

    def _adapter_module(self, planned: TensorPlan) -> TensorPlan | None:
        """Set the rank of a module of an adapter."""
        if not self.as_adapter or planned.module is None:
            return planned
        total = planned.rank
        if planned.rule in ("mean", "take"):
            total = sum(source.rank or 0 for source in planned.sources)
        limit = min(planned.shape)
        if total is None and self.rank is None:
            self.option_problems[
                f"{self.method.name} gives a dense update, which is no adapter; choose a rank to truncate it "
                "to (adapter_rank or --rank)"
            ] = None
            return None
        return replace(planned, rank=min(x for x in (total, self.rank, limit) if x is not None))

    def _extra_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        dtypes = []
        shape: tuple[int, ...] | None = None
        for t in range(len(self.tasks)):
            source, own = self._source(name, t, 1.0)
            if source is not None:
                shape = own if shape is None else shape
                dtypes.append(source.dtype or torch.float32)
        return shape or (), _widest(dtypes)

    def _missing(self, name: str, absent: Sequence[int]) -> None:
        labels = ", ".join(self.tasks[t].label for t in absent)
        if len(absent) == len(self.tasks):
            self.problems.add(name, f"is missing in {labels}", "base", "drop")
        else:
            kind = "is not changed by" if any(self.tasks[t].adapter_only for t in absent) else "is missing in"
            self.problems.add(name, f"{kind} {labels}", "present", "base")

    def _extra(self, name: str, sources: Sequence[Source]) -> None:
        labels = ", ".join(self.tasks[source.task].label for source in sources)
        if any(source.module is not None for source in sources):
            self.problems.add(
                name, f"is changed by the adapter {labels}, and the base has no such weight", "drop"
            )
        elif len(sources) == 1:
            entry = self.recipe.tasks()[sources[0].task]
            number = next(i for i, other in enumerate(self.recipe.models) if other is entry)
            self.problems.add(name, f"is in {labels} and not in the base", "drop", f"take:{number}")
        else:
            self.problems.add(name, f"is in {labels} and not in the base", "drop", "mean")

    def _shape_problem(self, draft: TensorPlan, other: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        shapes = ", ".join(f"{list(shape)} in {self.tasks[t].label}" for t, shape in other)
        where = "the base" if draft.in_base else "other models"
        rules = ["base", "drop"]
        if draft.in_base and all(
            len(shape) == len(draft.shape) and len(shape) > 0 and shape[1:] == draft.shape[1:]
            for _, shape in other
        ):
            rules = ["common_rows", "base"]
        if not draft.in_base:
            rules = ["drop"]
        self.problems.add(draft.name, f"has shape {list(draft.shape)} in {where}, {shapes}", *rules)

    def _check_rules(self, names: Sequence[str]) -> None:
        for i, rule in enumerate(self.recipe.tensors):
            if i in self.used_rules:
                continue
            shadowed = any(rule.matches(name) for name in names)
            reason = "an earlier rule takes every tensor it matches" if shadowed else "matches no tensor"
            self.problems.general.append(f"tensors[{i}] ({', '.join(rule.match)}): {reason}")
        for path, pattern in self.recipe.filters():
            if not any(pattern in name for name in names):
                self.notes.append(f"{path}: no tensor's name contains the filter {pattern!r}")


def _tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return, for every tied name but the one that is written, that one: the shared table if there is one."""
    tied = {}
    for names in checkpoint.tied:
        kept = next((name for name in names if name.split(".")[-2:] == ["shared", "weight"]), names[0])
        tied.update({name: kept for name in names if name != kept})
    return tied


def _prefix_note(strip: str, add: str) -> str:
    return f"{add!r} is put before" if add else f"{strip!r} is taken from"


def _as_matrix(shape: tuple[int, ...], elementwise: bool) -> tuple[tuple[int, int], int | None]:
    """Return the matrix that a method sees of a tensor, and the number of them for a stack."""
    if elementwise:
        if len(shape) < 2:
            return (1, math.prod(shape)), None
        return (shape[0], math.prod(shape[1:])), None
    if len(shape) == 3:
        return (shape[1], shape[2]), shape[0]
    return (shape[0], shape[1]), None


def _mean_bytes(draft: TensorPlan) -> int:
    # A mean is taken over chunks of rows: see the engine's CHUNK_BYTES.
    return min(6 * 4 * draft.numel, 6 * (64 << 20))


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
