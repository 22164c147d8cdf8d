"""Plans: every output tensor with its inputs, rule and cost, decided from headers alone.

Everything that does not fit together is found here, before a weight is read, and listed in one MismatchError
with the line of the recipe that resolves it.
"""

from __future__ import annotations

from dirmerge import __version__
from dirmerge.errors import RecipeError
from dirmerge.planning.adapter_output import AdapterPlanner
from dirmerge.planning.input_plan import InputPlan
from dirmerge.planning.inputs import find_inputs
from dirmerge.planning.model_output import ModelPlanner
from dirmerge.planning.plan import Plan, ScalePlan
from dirmerge.planning.problems import Problems
from dirmerge.planning.tensor_plan import Rule, Source, TensorPlan
from dirmerge.recipe import Recipe

__all__ = ["InputPlan", "Plan", "Rule", "ScalePlan", "Source", "TensorPlan", "make_plan"]


def make_plan(recipe: Recipe, as_adapter: bool = False, rank: int | None = None) -> Plan:
    """Plans the merge from the headers of all inputs.

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
    rank = rank if rank is not None else recipe.adapter_rank
    if rank is not None and not as_adapter:
        raise RecipeError(f"{recipe.origin}: adapter_rank requires --as adapter")
    if rank is not None and rank < 1:
        raise RecipeError(f"{recipe.origin}: adapter_rank must be at least 1, got {rank}")
    inputs, mismatches = find_inputs(recipe, as_adapter=as_adapter)
    problems = Problems(general=mismatches)
    try:
        if as_adapter:
            return AdapterPlanner(recipe, inputs, problems, rank).plan(__version__)
        return ModelPlanner(recipe, inputs, problems).plan(__version__)
    except BaseException:
        inputs.close()
        raise
