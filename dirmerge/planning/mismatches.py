"""Words the ways in which a tensor of the inputs does not fit, each with the rules that resolve it."""

from __future__ import annotations

from collections.abc import Sequence

from dirmerge.planning.inputs import Input
from dirmerge.planning.problems import Problems
from dirmerge.planning.tensor_plan import Source, TensorPlan
from dirmerge.recipe import Recipe


class Mismatches:
    """Adds to the problems of a plan what fine-tunes lack, have beyond the base, or have in another shape.

    Args:
        recipe: the recipe.
        tasks: the fine-tunes in the recipe's order.
        problems: takes what does not fit.
    """

    def __init__(self, recipe: Recipe, tasks: Sequence[Input], problems: Problems) -> None:
        self._recipe = recipe
        self._tasks = tasks
        self._problems = problems

    def missing(self, name: str, absent: Sequence[int]) -> None:
        """Adds a tensor that the fine-tunes of the given numbers lack."""
        labels = ", ".join(self._tasks[t].label for t in absent)
        if len(absent) == len(self._tasks):
            self._problems.add(name, f"is missing in {labels}", "base", "drop")
        else:
            kind = (
                "is not changed by" if any(self._tasks[t].adapter_only for t in absent) else "is missing in"
            )
            self._problems.add(name, f"{kind} {labels}", "present", "base")

    def extra(self, name: str, sources: Sequence[Source]) -> None:
        """Adds a tensor that fine-tunes have and the base lacks."""
        labels = ", ".join(self._tasks[source.task].label for source in sources)
        if any(source.module is not None for source in sources):
            self._problems.add(
                name, f"is changed by the adapter {labels}, and the base has no such weight", "drop"
            )
        elif len(sources) == 1:
            entry = self._recipe.tasks()[sources[0].task]
            number = next(i for i, other in enumerate(self._recipe.models) if other is entry)
            self._problems.add(name, f"is in {labels} and not in the base", "drop", f"take:{number}")
        else:
            self._problems.add(name, f"is in {labels} and not in the base", "drop", "mean")

    def shapes(self, draft: TensorPlan, other: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Adds a tensor that some fine-tunes, given with their shapes, have in another shape."""
        shapes = ", ".join(f"{list(shape)} in {self._tasks[t].label}" for t, shape in other)
        where = "the base" if draft.in_base else "other models"
        rules = ["base", "drop"]
        if draft.in_base and all(
            len(shape) == len(draft.shape) and len(shape) > 0 and shape[1:] == draft.shape[1:]
            for _, shape in other
        ):
            rules = ["common_rows", "base"]
        if not draft.in_base:
            rules = ["drop"]
        self._problems.add(draft.name, f"has shape {list(draft.shape)} in {where}, {shapes}", *rules)
