"""The table of methods: names, options with their ranges, cost estimates and default scales.

Another package adds a method by an entry point of the group `dirmerge.methods`: a module or object whose
import calls `register`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

import pydantic
import torch
from torch import Tensor

from dirmerge.linalg import single_thread, svd_flops
from dirmerge.methods.scale import Scale
from dirmerge.methods.tasks import MergedDelta, Tasks, kept_ranks
from dirmerge.ops.delta_add import DeltaAdd, delta_add

METHODS: dict[str, Method] = {}

# What the caller passes apart from the method's own options.
_CALL_ARGUMENTS = ("tasks", "weights", "seed")


class Cost(NamedTuple):
    """What merging one matrix costs, estimated from shapes alone.

    Attributes:
        flops: floating-point operations.
        peak_bytes: memory at its fullest.
        rank: of the merged update, None for a dense one.
    """

    flops: float
    peak_bytes: int
    rank: int | None


class AddRows(typing.Protocol):
    """Makes rows of W_0 + λ D; see RowForm."""

    def __call__(
        self,
        base: Tensor,
        weights: Sequence[Tensor],
        task_weights: Sequence[float],
        scale: float,
        thresholds: Tensor | None,
        dtype: torch.dtype,
    ) -> DeltaAdd:
        """Returns the rows in `dtype`, and how many of their entries are not finite."""


@dataclass(frozen=True)
class RowForm:
    """A method that makes rows of W_0 + λ D from the same rows of W_0 and all W_t, in one pass.

    Attributes:
        add: (W_0, [W_t], task weights, λ, thresholds or None, dtype of the result) -> DeltaAdd.
        threshold: what it needs of each whole W_t − W_0 before: (W_0, W_t, options) -> tensor (1,), None
            where these options need nothing. None for a method that needs nothing.
    """

    add: AddRows
    threshold: Callable[[Mapping[str, Any]], Callable[[Tensor, Tensor], Tensor] | None] | None = None


MethodFunction = Callable[..., MergedDelta]
OptionCheck = Callable[[Mapping[str, Any], bool], None]
CostEstimate = Callable[[tuple[int, ...], list[int | None], Mapping[str, Any]], Cost]


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        name: as in recipes.
        function: (tasks, weights, *, seed, **options) -> MergedDelta, pure.
        summary: one line for tables.
        elementwise: whether it works on tensors of any shape; the others need matrices.
        scale: default of λ for full fine-tunes.
        adapter_scale: default of λ for adapters.
        negative_weights: whether a weight below 0 has a meaning.
        is_mean: whether the weights are divided by their sum, which must not be 0 then.
        check: raises ValueError for options that make no sense together.
        estimate: cost from shapes alone.
        rows: how it makes rows from the stored weights, for a method that can.
        looks_twice: whether it loads deltas more than once.
        leaves_factors: whether it leaves the tasks' factors, from which alignments follow without the deltas.
    """

    name: str
    function: MethodFunction
    summary: str
    elementwise: bool
    scale: Scale
    adapter_scale: Scale
    negative_weights: bool
    is_mean: bool
    check: OptionCheck | None
    estimate: CostEstimate | None
    rows: RowForm | None = None
    looks_twice: bool = False
    leaves_factors: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Option names with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.name not in _CALL_ARGUMENTS}

    def default_scale(self, adapters: bool, tasks: int) -> Scale:
        """Returns how λ is chosen when the user says nothing, for adapters or not and that many tasks."""
        return (self.adapter_scale if adapters else self.scale).for_tasks(tasks)

    def validate(self, options: Mapping[str, Any], *, adapters: bool) -> dict[str, Any]:
        """Checks option names, types, ranges and combinations.

        Args:
            options: what the user gave.
            adapters: whether all deltas are adapters, which some defaults follow.

        Returns:
            The options as given, converted to their types.

        Raises:
            ValueError: naming every wrong option, with a suggestion for a misspelt name.
        """
        known = self.options
        problems = []
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                listed = ", ".join(known) or "none"
                problems.append(f"{self.name} has no option {name!r}{hint}; its options: {listed}")
        if problems:
            raise ValueError("; ".join(problems))
        try:
            model = _options_model(self.name)(**options)
        except pydantic.ValidationError as error:
            sentences = [
                f"{self.name}: option {e['loc'][0]!r}: {e['msg']}, got {e['input']!r}" for e in error.errors()
            ]
            raise ValueError("; ".join(dict.fromkeys(sentences))) from None
        checked = {name: getattr(model, name) for name in options}
        if self.check is not None:
            self.check(checked, adapters)
        return checked

    def check_weights(self, weights: list[float]) -> None:
        """Raises ValueError for weights that have no meaning for this method."""
        if not self.negative_weights and any(w < 0 for w in weights):
            raise ValueError(f"weights must not be negative for {self.name}, got {weights}")
        if all(w == 0 for w in weights):
            raise ValueError("weights must not all be 0: nothing would be merged")
        if self.is_mean and sum(weights) == 0:
            raise ValueError(f"weights must not sum to 0 for {self.name}, a weighted mean")

    def cost(
        self, shape: tuple[int, ...], n_tasks: int, ranks: list[int | None], options: Mapping[str, Any]
    ) -> Cost:
        """Estimates the cost of one matrix from shapes alone."""
        if len(ranks) != n_tasks:
            raise ValueError(f"ranks must have one entry per task, got {len(ranks)} for {n_tasks} tasks")
        estimate = self.estimate or (elementwise_cost if self.elementwise else spectral_cost)
        return estimate(shape, ranks, options)


def register(
    summary: str,
    *,
    scale: Scale,
    adapter_scale: Scale | None = None,
    elementwise: bool = False,
    negative_weights: bool = False,
    is_mean: bool = False,
    check: OptionCheck | None = None,
    estimate: CostEstimate | None = None,
    rows: RowForm | None = None,
    looks_twice: bool = False,
    leaves_factors: bool = False,
) -> Callable[[MethodFunction], MethodFunction]:
    """Makes a function a method under its own name; see `Method` for the arguments.

    Raises:
        ValueError: when the name is taken.
    """

    def add(function: MethodFunction) -> MethodFunction:
        name = function.__name__
        if name in METHODS:
            raise ValueError(f"a method named {name!r} is registered already")
        METHODS[name] = Method(
            name,
            function,
            summary,
            elementwise,
            scale,
            adapter_scale or scale,
            negative_weights,
            is_mean,
            check,
            estimate,
            rows,
            looks_twice,
            leaves_factors,
        )
        return function

    return add


def linear_rows(coefficients: Callable[[Sequence[float]], list[float]]) -> RowForm:
    """Returns the row form of D = Σ_t c_t D_t, with the coefficients c_t from the tasks' weights."""

    def add(
        base: Tensor,
        weights: Sequence[Tensor],
        task_weights: Sequence[float],
        scale: float,
        thresholds: Tensor | None,
        dtype: torch.dtype,
    ) -> DeltaAdd:
        factors = [scale * c for c in coefficients(task_weights)]
        return delta_add(base, weights, factors, out_dtype=dtype)

    return RowForm(add)


def get_method(name: str) -> Method:
    """Returns the method of that name, loading the entry points of other packages when it is not one of ours.

    Raises:
        ValueError: for an unknown name, with the names there are.
    """
    if name not in METHODS:
        _load_entry_points()
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown method {name!r}{hint}; known methods: {', '.join(sorted(METHODS))}")
    return METHODS[name]


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group="dirmerge.methods"):
        entry.load()


@cache
def _options_model(name: str) -> type[pydantic.BaseModel]:
    """A pydantic model of the method's keyword options, from its signature."""
    method = METHODS[name]
    hints = typing.get_type_hints(method.function, include_extras=True)
    fields: dict[str, Any] = {option: (hints[option], default) for option, default in method.options.items()}
    config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    return pydantic.create_model(f"{name}_options", __config__=config, **fields)


def elementwise_cost(shape: tuple[int, ...], ranks: list[int | None], options: Mapping[str, Any]) -> Cost:
    """A few passes over T tensors; sums keep one delta and the total, adapters stay factored."""
    size = 1
    for extent in shape:
        size *= extent
    if len(shape) == 2 and ranks and all(rank is not None for rank in ranks) and "density" not in options:
        total = sum(rank or 0 for rank in ranks)
        return Cost(2.0 * total * sum(shape), 8 * total * sum(shape), total)
    return Cost(4.0 * len(ranks) * size, 4 * (len(ranks) + 3) * size, None)


def spectral_cost(shape: tuple[int, ...], ranks: list[int | None], options: Mapping[str, Any]) -> Cost:
    """One truncated SVD (thin QRs for adapters) per task, two polar factors, T small coordinate matrices."""
    m, n = shape[-2:]
    kept = kept_ranks(Tasks((m, n), [_no_delta] * len(ranks), ranks), options.get("rank"))
    k = sum(kept)
    flops = float(2 * (m + n) * k * k)
    peak = 4 * (3 * (m + n) * k + 3 * k * k)
    for own, rank in zip(ranks, kept, strict=True):
        flops += 2.0 * k * k * rank
        if own is None:
            flops += svd_flops(m, n, rank, options.get("svd", "auto"))
            peak = max(peak, 4 * (4 * m * n + (m + n) * k))
        else:
            flops += 4.0 * (m + n) * own * own
    return Cost(flops, peak, k)


def _no_delta() -> typing.NoReturn:
    raise AssertionError("an estimate must not load a delta")


def merge_tasks(
    tasks: Tasks, method: str, weights: Sequence[float], options: Mapping[str, Any], seed: int = 0
) -> MergedDelta:
    """Merges lazily loaded deltas by a registered method; see `dirmerge.merge_deltas` for deltas in memory.

    Args:
        tasks: the deltas; those of weight 0 are left out before the method sees them.
        method: name of a registered method.
        weights: one per task.
        options: of the method, checked here.
        seed: of whatever is random in it.

    Raises:
        ValueError: for an unknown method, options or weights without meaning, or shapes the method cannot
        merge.
    """
    chosen = get_method(method)
    if len(tasks) == 0:
        raise ValueError("at least one delta is needed, got none")
    if len(weights) != len(tasks):
        raise ValueError(f"weights must have one entry per delta, got {len(weights)} for {len(tasks)}")
    numbers = [float(w) for w in weights]
    if not all(math.isfinite(w) for w in numbers):
        raise ValueError(f"weights must be finite, got {numbers}")
    chosen.check_weights(numbers)
    if not chosen.elementwise and (len(tasks.shape) != 2 or 0 in tasks.shape):
        raise ValueError(f"{method} merges matrices of shape (m, n), got {tasks.shape}")
    checked = chosen.validate(options, adapters=tasks.low_rank)
    present = [t for t, w in enumerate(numbers) if w != 0]
    if len(present) < len(tasks):
        tasks, numbers = tasks.subset(present), [numbers[t] for t in present]
    with single_thread(tasks.width):
        merged = chosen.function(tasks, numbers, seed=seed, **checked)
    merged.record.weights = [float(w) for w in weights]
    return merged
