"""Plans a merged model: every tensor of the base, and what the recipe adds to it."""

from __future__ import annotations

from dataclasses import replace

import torch

from dirmerge.planning.matching import Shape
from dirmerge.planning.rules import OutputPlanner
from dirmerge.planning.tensor_plan import Rule, Source, TensorPlan


class ModelPlanner(OutputPlanner):
    """Plans a model: the base's tensors changed, ties kept, tensors that the base lacks on request."""

    output = "model"

    def shape_of(self, name: str) -> tuple[Shape, torch.dtype]:
        """Returns the base's shape and dtype; of a tensor that it lacks, the fine-tunes'."""
        info = self.match.base_tensors.get(name)
        if info is None:
            return self.match.first_shape(name, torch.float32)
        return tuple(info.shape), info.dtype

    def draft(self, name: str, planned: TensorPlan) -> TensorPlan:
        """Notes whether the base has the tensor."""
        return replace(planned, in_base=name in self.match.base_tensors)

    def is_extra(self, planned: TensorPlan) -> bool:
        """Returns whether the base lacks the tensor."""
        return not planned.in_base

    def base_rule(self, planned: TensorPlan) -> TensorPlan | None:
        """Copies the base's tensor."""
        if planned.in_base:
            return replace(planned, rule="base")
        self.problems.add(planned.name, "the base has no such tensor to copy", "drop", "take")
        return None

    def default_rule(self, planned: TensorPlan) -> tuple[Rule, str] | None:
        """Returns the mean for what the base lacks."""
        return None if planned.in_base else ("mean", "mean of values: not in the base")

    def tied(self, planned: TensorPlan) -> TensorPlan | None:
        """Returns the plan of a tensor that the base ties to another."""
        name, tasks = planned.name, self.tasks
        tied_to = self.match.tied_to(name)
        if tied_to is None:
            return None
        sources = tuple(
            Source(t, 1.0, tensor=task.tensors[name])
            for t, task in enumerate(tasks)
            if name in task.tensors and tied_to in task.tensors
        )
        adapted = [task.label for task in tasks if name in task.modules or name in task.saved]
        if adapted:
            self.problems.add(
                name, f"is tied to {tied_to} in the base, and {', '.join(adapted)} change it alone", "drop"
            )
        return replace(
            planned,
            rule="tied",
            why="tied weights",
            tied_to=tied_to,
            sources=sources,
            notes=(f"equals {tied_to}, which is checked when it is read",),
        )
