"""The Python API of whole merges: what the command line does, as two functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dirmerge.checkpoints.plan import Plan
from dirmerge.checkpoints.planner import make_plan
from dirmerge.engine import local
from dirmerge.engine.result import MergeResult, ProgressCallback
from dirmerge.recipe import Recipe

RecipeSource = str | Path | Mapping[str, Any] | Recipe


def plan(recipe: RecipeSource, *, as_adapter: bool = False, rank: int | None = None) -> Plan:
    """Plan a merge from the headers of its inputs: no weight is read and nothing is written.

    Args:
        recipe: a YAML file, YAML text of several lines, or the same as a dict, in which state dicts may stand
            for paths.
        as_adapter: plan a PEFT adapter instead of a model; all models must be adapters.
        rank: rank of that adapter; by default Σ r_t.

    Returns:
        The plan: every output tensor with its inputs, rule, shape, dtype and cost.

    Raises:
        RecipeError: an invalid recipe; lists all that is wrong with it.
        CheckpointError: an input that cannot be read.
        MismatchError: inputs that do not fit together; lists every problem with the rule that resolves it.

    Example:
        >>> print(dirmerge.plan("recipe.yml").totals())
    """
    return make_plan(Recipe.load(recipe), as_adapter=as_adapter, rank=rank)


def merge(
    recipe: RecipeSource,
    out: str | Path | None = None,
    *,
    as_adapter: bool = False,
    rank: int | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeResult:
    """Merge fine-tuned models into one: W = W_0 + λ D for every weight, from files to files.

    Memory is bounded by the largest tensors and does not grow with the model.

    Args:
        recipe: a YAML file, YAML text of several lines, or the same as a dict, in which state dicts may stand
            for paths.
        out: the folder to write, which appears complete or not at all; None for a state dict in the result.
        as_adapter: write a PEFT adapter instead of a model; all models must be adapters.
        rank: rank of that adapter; by default Σ r_t.
        overwrite: whether an existing folder may be replaced; only one that dirmerge wrote and that holds no
            input, no recipe and not the working directory is.
        progress: called with a Progress after every tensor.

    Returns:
        MergeResult with `path` or `state_dict`, the λ used, a record per tensor, and `summary()`.

    Raises:
        RecipeError: an invalid recipe; lists all that is wrong with it.
        CheckpointError: an input that cannot be read.
        MismatchError: inputs that do not fit together; lists every problem with the rule that resolves it.
        NonFiniteError: NaN or Inf, with file and tensor.
        OutputError: the folder exists or cannot be written.

    Example:
        >>> result = dirmerge.merge("recipe.yml", "merged")
        >>> print(result.summary())
    """
    planned = plan(recipe, as_adapter=as_adapter, rank=rank)
    return local.run(planned, out, overwrite=overwrite, progress=progress)
