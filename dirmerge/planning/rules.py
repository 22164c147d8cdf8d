"""Decides tensor by tensor what becomes of it: the rules that model outputs and adapter outputs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from dirmerge.errors import MismatchError, RecipeError
from dirmerge.linalg import seed_for
from dirmerge.methods import get_method
from dirmerge.planning.costs import mean_bytes
from dirmerge.planning.input_plan import InputPlan
from dirmerge.planning.inputs import Inputs
from dirmerge.planning.matching import Matching, Shape
from dirmerge.planning.merge_rule import MergeRule, find_scale
from dirmerge.planning.mismatches import Mismatches
from dirmerge.planning.names import is_expert_stack, is_table, layer_depths
from dirmerge.planning.plan import Plan
from dirmerge.planning.problems import Problems
from dirmerge.planning.tensor_plan import Rule, Source, TensorPlan, dtype_name
from dirmerge.recipe import Recipe, TensorRule


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
        self.option_problems: dict[str, None] = {}
        self.mismatches = Mismatches(recipe, self.tasks, problems)
        self.scale = find_scale(recipe, self.method, self.match.adapters_only)
        self.merging = MergeRule(recipe, self.method, self.scale, self.config, problems, self.option_problems)

    def plan(self, version: str) -> Plan:
        """Returns the plan.

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
        """Returns a tensor's shape and dtype before any rule."""
        raise NotImplementedError

    def draft(self, name: str, planned: TensorPlan) -> TensorPlan:
        """Adds to a tensor's plan what only this kind of output has."""
        return planned

    def tied(self, planned: TensorPlan) -> TensorPlan | None:
        """Returns the plan of a tensor that is another name of one that is written."""
        return None

    def is_extra(self, planned: TensorPlan) -> bool:
        """Returns whether the output needs the base's tensor, and the base lacks it."""
        return False

    def base_rule(self, planned: TensorPlan) -> TensorPlan | None:
        """Applies the recipe's rule `base`."""
        raise NotImplementedError

    def default_rule(self, planned: TensorPlan) -> tuple[Rule, str] | None:
        """Returns a rule that only this kind of output has, with its reason."""
        return None

    def fits(self, planned: TensorPlan) -> bool:
        """Returns whether the output's format can hold the tensor; if not, the problem is added."""
        return True

    def finish(self, planned: TensorPlan) -> TensorPlan | None:
        """Completes a tensor that is merged, averaged or taken."""
        return planned

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
            self.mismatches.missing(name, absent)
            return None
        if not dtype.is_floating_point:
            return self._integers(draft, chosen, sources, absent, other_shape)
        if chosen == "common_rows":
            if absent:
                self.mismatches.missing(name, absent)
                return None
            return self._common_rows(draft, sources, weights, other_shape)
        if other_shape:
            self.mismatches.shapes(draft, other_shape)
            return None
        notes: list[str] = []
        if absent and chosen != "present":
            if not self.match.is_unchanged_by_adapters(name, absent):
                if self.is_extra(draft):
                    self.mismatches.extra(name, sources)
                else:
                    self.mismatches.missing(name, absent)
                return None
            sources = sorted([*sources, *(Source(t, weights[t]) for t in absent)], key=lambda s: s.task)
            notes.append("adapters leave it unchanged: their delta is 0")
        elif absent:
            labels = ", ".join(self.tasks[t].label for t in absent)
            notes.append(f"without {labels}, which lack it")
        elif self.is_extra(draft) and chosen is None:
            self.mismatches.extra(name, sources)
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
        name = draft.name
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
            planned = replace(draft, rule="mean", why=reason, flops=flops, peak_bytes=mean_bytes(draft))
            return self.finish(planned)
        if self.is_extra(draft):
            self.problems.add(
                name, "the base has no such tensor, so it has no delta to merge", "mean", "drop", "take"
            )
            return None
        merged = self.merging.plan(draft, reason, depth)
        return None if merged is None else self.finish(merged)

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
            peak_bytes=mean_bytes(draft),
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
            self.mismatches.shapes(draft, other_shape)
            return None
        if not draft.in_base and chosen != "present":
            self.mismatches.extra(draft.name, sources)
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
                self.mismatches.shapes(draft, other_shape)
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
            peak_bytes=mean_bytes(draft),
        )

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
