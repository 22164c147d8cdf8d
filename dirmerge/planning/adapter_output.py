"""Plans a merged PEFT adapter: every module that an adapter changes, and the tensors saved beside them."""

from __future__ import annotations

from dataclasses import replace

import torch

from dirmerge.planning.inputs import Inputs
from dirmerge.planning.matching import Shape
from dirmerge.planning.problems import Problems
from dirmerge.planning.rules import OutputPlanner
from dirmerge.planning.tensor_plan import Rule, TensorPlan
from dirmerge.recipe import Recipe


class AdapterPlanner(OutputPlanner):
    """Plans an adapter: updates of modules, without a base.

    Args:
        recipe: the recipe.
        inputs: opened adapters.
        problems: what did not fit so far.
        rank: of the modules' updates at most; None for all directions.
    """

    output = "adapter"

    def __init__(self, recipe: Recipe, inputs: Inputs, problems: Problems, rank: int | None) -> None:
        super().__init__(recipe, inputs, problems)
        self.rank = rank

    def shape_of(self, name: str) -> tuple[Shape, torch.dtype]:
        """Returns the adapters' shape and widest dtype."""
        return self.match.first_shape(name, self.match.factor_dtype)

    def draft(self, name: str, planned: TensorPlan) -> TensorPlan:
        """Notes the module that the tensor belongs to."""
        return replace(planned, in_base=False, module=self.match.module(name))

    def base_rule(self, planned: TensorPlan) -> TensorPlan | None:
        """Leaves the tensor out: the base has it already."""
        return replace(planned, rule="drop", notes=("the base's own weight stays",))

    def default_rule(self, planned: TensorPlan) -> tuple[Rule, str] | None:
        """Returns the mean for full tensors."""
        return ("mean", "mean of values: saved beside the adapters") if planned.module is None else None

    def fits(self, draft: TensorPlan) -> bool:
        """Returns whether PEFT can store the tensor: as updates of all adapters, or in full beside them."""
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

    def finish(self, planned: TensorPlan) -> TensorPlan | None:
        """Sets the rank of a module of an adapter."""
        if planned.module is None:
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
