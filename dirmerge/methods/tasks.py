"""What a method takes and returns: lazily loaded task deltas, and the merged delta with its record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank

Delta = Tensor | LowRank
TaskDelta = Delta | Difference

# Types of options that several methods have: their ranges are checked before a method runs.
Rank = Annotated[int, Field(ge=1)]
Tolerance = Annotated[float, Field(gt=0, lt=1)]


class Tasks:
    """The deltas D_1 … D_T of one parameter, loaded one at a time.

    A method iterates as often as it needs and keeps what it must; a loader that reads from disk thereby
    bounds memory.

    Args:
        shape: of every delta; (m, n) for the spectral methods.
        loaders: one callable per task that returns its delta: a tensor in float32 or float64, a Difference of
            two weights, or a LowRank.
        ranks: per task the rank of its LowRank delta, None for the others.
        names: per task, for messages.
        device: where the deltas are.
    """

    def __init__(
        self,
        shape: Sequence[int],
        loaders: Sequence[Callable[[], TaskDelta]],
        ranks: Sequence[int | None],
        names: Sequence[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if len(loaders) != len(ranks):
            raise ValueError(f"ranks must have one entry per task, got {len(ranks)} for {len(loaders)} tasks")
        self.shape = tuple(shape)
        self.ranks = tuple(ranks)
        self.names = tuple(names) if names is not None else tuple(f"delta {t}" for t in range(len(loaders)))
        self.device = torch.device("cpu") if device is None else device
        self._loaders = tuple(loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __getitem__(self, t: int) -> TaskDelta:
        return self._loaders[t]()

    def __iter__(self) -> Iterator[TaskDelta]:
        return (loader() for loader in self._loaders)

    def dense(self, t: int) -> Tensor:
        """Loads delta t as a dense tensor."""
        delta = self[t]
        return delta if isinstance(delta, Tensor) else delta.dense()

    @property
    def low_rank(self) -> bool:
        """Whether every delta is a LowRank: the merge then stays factored."""
        return all(rank is not None for rank in self.ranks)

    @property
    def width(self) -> int:
        """The columns a factored merge works on: Σ r_t where all deltas are LowRank, else max(m, n)."""
        ranks = [rank for rank in self.ranks if rank is not None]
        return sum(ranks) if self.low_rank else max(self.shape, default=0)

    def subset(self, indices: Sequence[int]) -> Tasks:
        """Returns the tasks at the given positions."""
        return Tasks(
            self.shape,
            [self._loaders[t] for t in indices],
            [self.ranks[t] for t in indices],
            [self.names[t] for t in indices],
            self.device,
        )


@dataclass
class MergeRecord:
    """What happened to one parameter.

    Attributes:
        method: name of the method.
        options: the options it ran with, defaults filled in.
        shape: of the parameter.
        weights: one per task; a task of weight 0 took no part.
        ranks: per task the directions kept; empty for methods that keep none apart.
        rank: of the factored result, None for a dense one.
        energy: per task Σ s² of the kept directions over ‖D_t‖²_F; 0-d tensors until they are read where
            decisions are deferred (see `linalg.conditions.number`).
        fallbacks: every place where a method took another road than the one asked for, and why.
        notes: facts worth knowing (directions left out, power iterations, …).
        scale: λ that was multiplied into the result.
        alignment: a(D) after scaling, None where it was not computed.
    """

    method: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    weights: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    rank: int | None = None
    energy: list[float] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scale: float = 1.0
    alignment: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as plain data (JSON)."""
        return asdict(self)


@dataclass(eq=False)
class Factors:
    """Leading singular triplets of all tasks, null directions left out.

    Attributes:
        u: (m, K) left bases of all tasks side by side, K = Σ r_t.
        s: per task (r_t,).
        v: (n, K) right bases.
        asked: per task the directions asked for; fewer stand in s where the task has no more.
        energy: per task the captured energy.
        notes: how they were found.
    """

    u: Tensor
    s: list[Tensor]
    v: Tensor
    asked: list[int]
    energy: list[float]
    notes: list[str]

    @property
    def ranks(self) -> list[int]:
        """Directions kept per task."""
        return [len(s) for s in self.s]

    def weighted(self, weights: Sequence[float]) -> Tensor:
        """Returns (K,) all singular values, each task's multiplied by its weight."""
        return torch.cat([s * w for s, w in zip(self.s, weights, strict=True)])

    def blocks(self) -> list[slice]:
        """Returns each task's columns in the stacked bases."""
        edges = [0]
        for rank in self.ranks:
            edges.append(edges[-1] + rank)
        return [slice(a, b) for a, b in itertools.pairwise(edges)]


@dataclass(eq=False)
class MergedDelta:
    """A merged update D, factored where the method keeps it so.

    Attributes:
        value: LowRank or dense tensor.
        record: what happened.
        factors: the task factors the method computed on its way, None if it needed none.
    """

    value: Delta
    record: MergeRecord
    factors: Factors | None = field(default=None, repr=False)

    def dense(self) -> Tensor:
        """Returns D as a dense tensor of the parameter's shape."""
        return self.value.dense() if isinstance(self.value, LowRank) else self.value

    def low_rank(self) -> LowRank | None:
        """Returns D as a LowRank, or None where the method has no factored result."""
        return self.value if isinstance(self.value, LowRank) else None

    def scaled(self, factor: float) -> MergedDelta:
        """Returns factor · D; the record's λ and alignment follow."""
        value = self.value.scaled(factor) if isinstance(self.value, LowRank) else self.value * factor
        alignment = None if self.record.alignment is None else self.record.alignment * factor
        changes = {"scale": self.record.scale * factor, "alignment": alignment}
        return MergedDelta(value, MergeRecord(**{**vars(self.record), **changes}), self.factors)


def kept_ranks(tasks: Tasks, rank: int | None = None) -> list[int]:
    """Returns the directions to keep: ⌊p/T⌋ of a dense delta, an adapter's own rank; `rank` limits both."""
    p = min(tasks.shape)
    share = max(1, p // len(tasks))
    return [
        min(rank or (own if own is not None else share), p if own is None else min(own, p))
        for own in tasks.ranks
    ]


def sum_tasks(tasks: Tasks, weights: Sequence[float]) -> Delta:
    """Computes Σ_t w_t D_t: a LowRank when every delta is one, else dense with one delta in memory."""
    if tasks.low_rank:
        return LowRank.sum([_low_rank(delta).scaled(w) for delta, w in zip(tasks, weights, strict=True)])
    total: Tensor | None = None
    for t, weight in enumerate(weights):
        delta = tasks[t]
        if isinstance(delta, LowRank):
            delta = delta.dense()
        if total is None:
            total = torch.zeros(delta.shape, dtype=delta.dtype, device=delta.device)
        if isinstance(delta, Difference):
            delta.add_to_(total, weight)
        else:
            total.add_(delta, alpha=weight)
        del delta
    assert total is not None  # Tasks are never empty: checked by merge_tasks
    return total


def _low_rank(delta: TaskDelta) -> LowRank:
    if not isinstance(delta, LowRank):
        raise TypeError("a task announced as low-rank loaded as a dense tensor")
    return delta
