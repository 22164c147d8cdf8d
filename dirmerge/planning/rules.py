"""Decides tensor by tensor what becomes of it: the rules that model outputs and adapter outputs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from dirmerge.errors import MismatchError, RecipeError
from dirmerge.linalg import seed_for
from dirmerge.methods import get_method
from dirmerge.planning.inputs import Inputs
from dirmerge.planning.matching import Matching, Shape
from dirmerge.planning.names import is_expert_stack, is_table, layer_depths
from dirmerge.planning.plan import (
    CHUNK_BYTES,
    WHOLE_BYTES,
    InputPlan,
    Plan,
    Rule,
    ScalePlan,
    Source,
    TensorPlan,
    dtype_name,
)
from dirmerge.planning.problems import Problems
from dirmerge.recipe import Recipe, Setting, TensorRule


class OutputPlanner:
    """Decides tensor by tensor; collects problems instead of stopping at the first.

    The two kinds of output differ in what their tensors are and in a few rules, which the subclasses add.

    Args:
        recipe: the recipe.
        inputs: opened, with their names matched.
        problems: what did not fit so far.
    """

    output: Literal["model", "adapter"]

    def __init__(self, recipe: Recipe, inputs: Inputs, problems: Problems) -> None:
        self.recipe = recipe
        self.method = get_method(recipe.method)
        self.inputs = inputs
        self.tasks = inputs.tasks
        self.match = Matching(inputs, problems)
        self.problems = problems
        self.notes: list[str] = list(inputs.notes)
        checkpoint = inputs.base.checkpoint if inputs.base is not None else None
        self.config = checkpoint.config if checkpoint is not None else None
        self.used_rules: set[int] = set()
        self.checked_options: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.option_problems: dict[str, None] = {}
        self.scale = self._scale()

    def plan(self, version: str) -> Plan:
        """Return the plan.

        Args:
            version: of dirmerge.

        Raises:
            RecipeError: options or weights that the method refuses.
            MismatchError: everything that does not fit together.
        """
        recipe = self.recipe
        names = self.match.names(with_base=self.output == "model")
        depths = layer_depths(names)
        tensors = [planned for name in names if (planned := self._tensor(name, depths[name])) is not None]
        self._check_rules(names)
        if self.option_problems:
            raise RecipeError(f"{recipe.origin}: " + "; ".join(self.option_problems))
        self.problems.raise_if_any(recipe.origin, names)
        if self.output == "adapter" and not any(tensor.written for tensor in tensors):
            raise MismatchError(f"{recipe.origin}: no module is left for the adapter")
        base, reference = self.inputs.base, recipe.base_model
        base_name = None if reference is None or not isinstance(reference.source, str) else reference.source
        return Plan(
            version=version,
            method_name=self.method.name,
            output=self.output,
            recipe=recipe.to_plain(),
            origin=recipe.origin,
            recipe_files=[str(path) for path in recipe.files],
            base=None if base is None else InputPlan.of(base),
            tasks=[InputPlan.of(task) for task in self.inputs.tasks],
            tensors=tensors,
            scale=self.scale,
            seed=recipe.seed,
            dtype=recipe.output_dtype,
            shard_size=recipe.shard_size,
            tokenizer=recipe.tokenizer_from,
            chat_template=recipe.chat_template,
            base_name=base_name,
            notes=self.notes,
            _inputs=self.inputs,
        )

    def shape_of(self, name: str) -> tuple[Shape, torch.dtype]:
        """Return a tensor's shape and dtype before any rule."""
        raise NotImplementedError

    def draft(self, name: str, planned: TensorPlan) -> TensorPlan:
        """Add to a tensor's plan what only this kind of output has."""
        return planned

    def tied(self, planned: TensorPlan) -> TensorPlan | None:
        """Return the plan of a tensor that is another name of one that is written."""
        return None

    def is_extra(self, planned: TensorPlan) -> bool:
        """Whether the output needs the base's tensor, and the base lacks it."""
        return False

    def base_rule(self, planned: TensorPlan) -> TensorPlan | None:
        """Apply the recipe's rule `base`."""
        raise NotImplementedError

    def default_rule(self, planned: TensorPlan) -> tuple[Rule, str] | None:
        """Return a rule that only this kind of output has, with its reason."""
        return None

    def fits(self, planned: TensorPlan) -> bool:
        """Whether the output's format can hold the tensor; if not, the problem is added."""
        return True

    def finish(self, planned: TensorPlan) -> TensorPlan | None:
        """Complete a tensor that is merged, averaged or taken."""
        return planned

    def _scale(self) -> ScalePlan:
        recipe = self.recipe
        if recipe.scale is not None:
            origin = "mergekit's linear" if recipe.merge_method == "linear" else "recipe"
            return ScalePlan(recipe.scale, None, "model", origin)
        if recipe.alignment is not None:
            return ScalePlan(None, recipe.alignment, recipe.alignment_per, "recipe")
        count = max(1, recipe.present())
        default = self.method.default_scale(self.match.adapters_only, count)
        kind = "adapters" if self.match.adapters_only else "full fine-tunes"
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

    def _tensor(self, name: str, depth: float) -> TensorPlan | None:
        index, rule = next(
            ((i, rule) for i, rule in enumerate(self.recipe.tensors) if rule.matches(name)), (None, None)
        )
        if index is not None:
            self.used_rules.add(index)
        why = None if index is None else f"tensors[{index}]"
        shape, dtype = self.shape_of(name)
        out_dtype = dtype
        if dtype.is_floating_point and self.recipe.output_dtype is not None:
            out_dtype = self.recipe.output_dtype
        planned = self.draft(
            name, TensorPlan(name, shape, out_dtype, "base", why or "", seed=seed_for(name, self.recipe.seed))
        )
        if rule is None and (tied := self.tied(planned)) is not None:
            return tied
        chosen = rule.rule if rule is not None else None
        if chosen == "drop":
            return replace(planned, rule="drop")
        if chosen == "base":
            return self.base_rule(planned)
        if rule is not None and chosen == "take":
            return self._take(planned, rule)
        return self._combined(planned, chosen, why, depth, dtype)

    def _combined(
        self,
        draft: TensorPlan,
        chosen: str | None,
        why: str | None,
        depth: float,
        dtype: torch.dtype,
    ) -> TensorPlan | None:
        name, shape = draft.name, draft.shape
        weights = self.recipe.weights(name, depth)
        sources: list[Source] = []
        absent: list[int] = []
        other_shape: list[tuple[int, tuple[int, ...]]] = []
        for t in range(len(self.tasks)):
            source, own_shape = self.match.source(name, t, weights[t])
            if source is None:
                absent.append(t)
            elif own_shape != shape:
                other_shape.append((t, own_shape))
            else:
                if source.dtype is not None and source.dtype.is_floating_point != dtype.is_floating_point:
                    self.problems.add(
                        name,
                        f"is {dtype_name(source.dtype)} in {self.tasks[t].label}, "
                        f"{dtype_name(dtype)} elsewhere",
                        "base",
                        "drop",
                    )
                    return None
                sources.append(source)
        if len(absent) == len(self.tasks):
            if not dtype.is_floating_point:
                return replace(draft, rule="identical", why="integers: the base's, no model has them")
            if self.match.adapters_only:
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
            if not self.match.is_unchanged_by_adapters(name, absent):
                if self.is_extra(draft):
                    self._extra(name, sources)
                else:
                    self._missing(name, absent)
                return None
            sources = sorted([*sources, *(Source(t, weights[t]) for t in absent)], key=lambda s: s.task)
            notes.append("adapters leave it unchanged: their delta is 0")
        elif absent:
            labels = ", ".join(self.tasks[t].label for t in absent)
            notes.append(f"without {labels}, which lack it")
        elif self.is_extra(draft) and chosen is None:
            self._extra(name, sources)
            return None
        draft = replace(draft, sources=tuple(sources), notes=tuple(notes))
        if draft.numel == 0 and draft.in_base:
            return replace(draft, rule="base", why="it has no entries", sources=())
        if not self.fits(draft):
            return None
        if all(source.weight == 0 for source in sources):
            if not draft.in_base:
                self.problems.add(name, "all weights are 0 and there is no base to fall back on", "drop")
                return None
            return replace(draft, rule="base", why="all weights are 0 here", sources=())
        return self._merge_or_mean(draft, chosen, why, depth)

    def _merge_or_mean(
        self, draft: TensorPlan, chosen: str | None, why: str | None, depth: float
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
            return self.finish(planned)
        if self.is_extra(draft):
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
        value = None if self.scale.value is None else self.scale.value.at(name, depth)
        if self.scale.alignment is None and value is None:
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
        notes = list(draft.notes)
        by_rows = value is not None and self.method.rows is not None and draft.in_base
        if by_rows and all(source.module is None for source in active) and self.method.rows is not None:
            peak = _mean_bytes(draft)
            if self.method.rows.threshold is not None and self.method.rows.threshold(options) is not None:
                stored = draft.numel * (loaded or draft.dtype.itemsize)
                whole = (len(active) + 1) * stored
                if whole > WHOLE_BYTES:
                    notes.append("is read twice: it is too large to be held for all models at once")
                peak += min(whole, max(WHOLE_BYTES, 2 * stored))
        return self.finish(
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
                notes=tuple(notes),
            )
        )

    def _default_rule(self, draft: TensorPlan) -> tuple[Rule, str]:
        name, shape = draft.name, draft.shape
        own = self.default_rule(draft)
        if own is not None:
            return own
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
        source, shape = self.match.source(draft.name, t, 1.0)
        if self.is_extra(draft):
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
        if source.module is not None and self.is_extra(draft):
            self.problems.add(draft.name, "the base has no such weight for the adapter to change", "drop")
            return None
        planned = replace(
            draft,
            rule="take",
            shape=shape,
            sources=(source,),
            rank=source.rank if draft.module is not None else None,
            notes=notes,
            peak_bytes=_mean_bytes(draft),
        )
        return self.finish(planned)

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
                draft.name, f"is {dtype_name(draft.dtype)}: there is no mean of integers", "base"
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
            source, _ = self.match.source(draft.name, t, weights[t])
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
    # A mean is taken over chunks of rows.
    return min(6 * 4 * draft.numel, 6 * CHUNK_BYTES)
