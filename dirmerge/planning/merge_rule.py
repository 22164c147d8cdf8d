"""The rule `merge`: the method, its options and λ for one tensor, and what they cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dirmerge.methods import Method
from dirmerge.planning.costs import as_matrix, merge_cost
from dirmerge.planning.names import is_table
from dirmerge.planning.plan import ScalePlan
from dirmerge.planning.problems import Problems
from dirmerge.planning.tensor_plan import TensorPlan
from dirmerge.recipe import Recipe, Setting


def find_scale(recipe: Recipe, method: Method, adapters_only: bool) -> ScalePlan:
    """Returns how λ is found: as the recipe says, or by the method's default.

    Args:
        recipe: the recipe.
        method: its method.
        adapters_only: whether every fine-tune is an adapter on the base.
    """
    if recipe.scale is not None:
        origin = "mergekit's linear" if recipe.merge_method == "linear" else "recipe"
        return ScalePlan(recipe.scale, None, "model", origin)
    if recipe.alignment is not None:
        return ScalePlan(None, recipe.alignment, recipe.alignment_per, "recipe")
    count = max(1, recipe.present())
    default = method.default_scale(adapters_only, count)
    kind = "adapters" if adapters_only else "full fine-tunes"
    origin = f"default of {method.name} for {kind}, T = {count}"
    if default.value is not None:
        return ScalePlan(Setting(((None, default.value),)), None, "model", origin)
    return ScalePlan(None, default.alignment, recipe.alignment_per, origin)


class MergeRule:
    """Plans the tensors that the method merges.

    Args:
        recipe: the recipe.
        method: its method.
        scale: how λ is found.
        config: the base's config.json, if there is one.
        problems: takes tensors that the method cannot merge.
        option_problems: takes options, weights and scales that the method refuses.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        scale: ScalePlan,
        config: dict[str, Any] | None,
        problems: Problems,
        option_problems: dict[str, None],
    ) -> None:
        self._recipe = recipe
        self._method = method
        self._scale = scale
        self._config = config
        self._problems = problems
        self._option_problems = option_problems
        self._checked_options: dict[tuple[Any, ...], dict[str, Any]] = {}

    def plan(self, draft: TensorPlan, why: str, depth: float) -> TensorPlan | None:
        """Returns the plan of a merged tensor; None where a problem was added instead.

        Args:
            draft: the tensor with its sources.
            why: where the rule comes from.
            depth: of its layer, for settings that change with depth.
        """
        name, shape, method = draft.name, draft.shape, self._method
        if not method.elementwise and (len(shape) not in (2, 3) or 0 in shape):
            self._problems.add(
                name, f"has shape {list(shape)}, and {method.name} merges matrices", "mean", "base"
            )
            return None
        low_rank = all(source.rank is not None for source in draft.sources)
        options = self._options(name, depth, low_rank)
        try:
            method.check_weights([source.weight for source in draft.sources])
        except ValueError as error:
            self._option_problems[f"models[…].parameters.weight: {error}"] = None
            return None
        value = None if self._scale.value is None else self._scale.value.at(name, depth)
        if self._scale.alignment is None and value is None:
            self._option_problems[f"scale: has no value for {name}; add an item without filter"] = None
            return None
        matrix, _ = as_matrix(shape, method.elementwise)
        cost = merge_cost(draft, method, options, by_rows=value is not None)
        return replace(
            draft,
            rule="merge",
            why=why,
            options=options,
            scale=None if value is None else float(value),
            aligned=len(shape) >= 2 and min(matrix) > 1 and is_table(name, shape, self._config) is None,
            rank=cost.rank,
            slices=cost.slices,
            flops=cost.flops,
            peak_bytes=cost.peak_bytes,
            notes=draft.notes + cost.notes,
        )

    def _options(self, name: str, depth: float, adapters: bool) -> dict[str, Any]:
        given = self._recipe.options(name, depth)
        key = (adapters, *sorted(given.items(), key=lambda item: item[0]))
        if key not in self._checked_options:
            try:
                self._checked_options[key] = self._method.validate(given, adapters=adapters)
            except ValueError as error:
                self._option_problems[f"parameters: {error}"] = None
                self._checked_options[key] = {}
        return self._checked_options[key]
