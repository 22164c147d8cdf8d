"""What every method works with: lazy task deltas, their factors, and the merged delta with its record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dirmerge.difference import Difference
from dirmerge.linalg import SVDMethod, TruncatedSVD, gram_root, numerical_rank, polar, svd_truncated
from dirmerge.lowrank import LowRank

Delta = Tensor | LowRank
TaskDelta = Delta | Difference

# Types of options that several methods have: their ranges are checked before a method runs.
Rank = Annotated[int, Field(ge=1)]
Tolerance = Annotated[float, Field(gt=0, lt=1)]
Smoothing = Literal["none", "average", "linear"]

# The ratio of singular values above which a frame stays a product: its square bounds the loss of accuracy.
FACTORED_FRAME = 0.25


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
        energy: per task Σ s² of the kept directions over ‖D_t‖²_F.
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


@dataclass(frozen=True)
class Scale:
    """How λ is chosen: a raw value, or the data-free alignment target from which it follows; one is set.

    Attributes:
        value: raw λ.
        alignment: target for a(λD).
        at_tasks: the number of tasks that it is for; None: for any number.
        power: it falls with T to this power.
        limit: and is this at most; 1 for one task alone.
    """

    value: float | None = None
    alignment: float | None = None
    at_tasks: int | None = None
    power: float = 0.5
    limit: float = 1.0

    def __post_init__(self) -> None:
        if (self.value is None) == (self.alignment is None):
            raise ValueError("exactly one of value and alignment must be given")

    def for_tasks(self, count: int) -> Scale:
        """Returns the scale for that many tasks: x · (at_tasks / T)^power, at most `limit` (1 for one task).

        Args:
            count: T, of the tasks that take part.

        Source:
            this project: scans of 4, 6, 8, 12 and 16 tasks, benchmarks/results/tasks.md.
        """
        if self.at_tasks is None:
            return self
        factor, limit = (self.at_tasks / count) ** self.power, self.limit if count > 1 else 1.0
        value, alignment = (
            None if x is None else round(min(limit, x * factor), 3) for x in (self.value, self.alignment)
        )
        return Scale(value, alignment)


# Defaults of the spectral methods: one target per setting, which falls with √T; sums of task vectors have
# their own, which fall with T. What they lose against each method's own best λ on validation texts, over
# settings of 4 to 16 tasks, stands in benchmarks/results/tasks.md.
FULL_ALIGNMENT = Scale(alignment=0.9, at_tasks=8, limit=1.15)
ADAPTER_ALIGNMENT = Scale(alignment=0.6, at_tasks=8)


def kept_ranks(tasks: Tasks, rank: int | None = None) -> list[int]:
    """Returns the directions to keep: ⌊p/T⌋ of a dense delta, an adapter's own rank; `rank` limits both."""
    p = min(tasks.shape)
    share = max(1, p // len(tasks))
    return [
        min(rank or (own if own is not None else share), p if own is None else min(own, p))
        for own in tasks.ranks
    ]


def factor_tasks(
    tasks: Tasks,
    ranks: Sequence[int],
    svd: SVDMethod,
    svd_tolerance: float,
    seed: int,
) -> Factors:
    """Computes the leading triplets of every task; an adapter's come exactly from its factors.

    Directions at the level of rounding are left out: they are noise of the decomposition, not of the task.
    """
    m, n = tasks.shape
    factors = Factors(torch.empty(0), [], torch.empty(0), list(ranks), [], [])
    methods: set[str] = set()
    iterations = size = 0
    for t, triplets in enumerate(_decompositions(tasks, ranks, svd, svd_tolerance, seed)):
        rank = ranks[t]
        if tasks.ranks[t] is None:
            methods.add(triplets.method)
            iterations = max(iterations, triplets.power_iterations)
            if triplets.method == "randomized" and float(triplets.gain) > svd_tolerance:
                factors.notes.append(
                    f"{tasks.names[t]}: power iteration {triplets.power_iterations}, the last, still gained "
                    f"{float(triplets.gain):.1e} of energy (svd_tolerance {svd_tolerance:.1e})"
                )
        keep = min(rank, int(numerical_rank(triplets.s, max(tasks.shape))))
        kept = triplets.truncated(keep)
        factors.energy.append(float(kept.energy))
        if keep < rank:
            factors.notes.append(f"{tasks.names[t]}: only {keep} of {rank} directions stand above rounding")
        if t == 0:
            factors.u = kept.u.new_empty(m, sum(ranks))
            factors.v = kept.v.new_empty(n, sum(ranks))
        factors.u[:, size : size + keep] = kept.u
        factors.v[:, size : size + keep] = kept.v
        factors.s.append(kept.s)
        size += keep
    factors.u, factors.v = factors.u[:, :size], factors.v[:, :size]
    if "randomized" in methods:
        factors.notes.append(f"randomized SVD, at most {iterations} power iterations")
    return factors


def _decompositions(
    tasks: Tasks, ranks: Sequence[int], svd: SVDMethod, svd_tolerance: float, seed: int
) -> Iterator[TruncatedSVD]:
    """Yields every task's leading triplets.

    Weights on an accelerator are there already, and a batch reads W_0 once and fills the device; on a CPU
    one task at a time is loaded, which bounds memory.
    """
    if tasks.device.type != "cpu" and all(rank is None for rank in tasks.ranks):
        deltas = [delta for delta in tasks if isinstance(delta, Difference)]
        if len(deltas) == len(tasks) and _is_batch(deltas):
            batch = Difference(tuple(d.weights[0] for d in deltas), deltas[0].base, deltas[0].is_transposed)
            found = svd_truncated(batch, max(ranks), svd, seed=seed, tolerance=svd_tolerance)
            yield from found.unbind()
            return
    for t, rank in enumerate(ranks):
        delta = tasks[t]
        if isinstance(delta, LowRank):
            yield delta.svd()
        else:
            yield svd_truncated(delta, rank, svd, seed=seed, tolerance=svd_tolerance)
        del delta


def _is_batch(deltas: Sequence[Difference]) -> bool:
    first = deltas[0]
    return all(
        d.base is first.base
        and d.is_transposed == first.is_transposed
        and d.weights[0].dtype == first.weights[0].dtype
        for d in deltas
    )


@dataclass(frozen=True, eq=False)
class Cover:
    """An orthonormal frame C = basis · core nearest to the stacked task bases, formed only where it must be.

    Attributes:
        basis: (m, K).
        core: (K, K), or None for the identity: then the basis is the frame.
        coordinates: (K, K) = Cᵀ [U_1 … U_T].
    """

    basis: Tensor
    core: Tensor | None
    coordinates: Tensor

    def frame(self) -> Tensor:
        """Returns the (m, K) frame."""
        return self.basis if self.core is None else self.basis @ self.core


def cover_space(bases: Tensor, svd: SVDMethod, side: str, record: MergeRecord) -> Cover:
    """Computes polar([U_1 … U_T]), the orthonormal frame nearest to all task bases at once.

    Directions that the stacked bases do not span (a task merged with itself, say) stay zero instead of being
    completed by arbitrary ones, which would enter the merged update as noise. Of nearly orthogonal bases, as
    those of a few adapters are, the frame stays a product: U G^(−1/2).
    """
    gram = gram_root(bases)
    if gram is not None and gram.condition > FACTORED_FRAME:
        return Cover(bases, gram.inverse.to(bases.dtype), gram.root.to(bases.dtype))
    found = polar(bases, "exact" if svd == "exact" else "auto", complete=False)
    if found.fallback is not None:
        record.fallbacks.append(f"{side} cover space: {found.fallback}; exact form used")
    full = min(found.q.shape)
    if int(found.rank) < full:
        record.notes.append(f"{side} cover space: the tasks span {int(found.rank)} of {full} directions")
    return Cover(found.q, None, found.q.mT @ bases)


def between(left: Cover, middle: Tensor, right: Cover) -> LowRank:
    """Returns C_l · middle · C_rᵀ for middle (K, K), or (K,) the diagonal of one."""
    if left.core is None and right.core is None:
        if middle.ndim == 1:
            return LowRank(left.basis * middle, None, right.basis)
        return LowRank(left.basis, middle, right.basis)
    if left.core is not None:
        middle = left.core * middle if middle.ndim == 1 else left.core @ middle
    elif middle.ndim == 1:
        middle = torch.diag(middle)
    if right.core is not None:
        middle = middle @ right.core.mT
    return LowRank(left.basis, middle, right.basis)


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


def balanced(s: Tensor, smoothing: Smoothing, rho: float = 5.0) -> Tensor:
    """Balances the energy of singular values, keeping their sum.

    Args:
        s: (r,) singular values, descending and above zero.
        smoothing: "none", "average" or "linear".
        rho: largest ratio of the first to the last value under "linear".

    Returns:
        (r,) balanced values with the same sum.

    Source:
        DC-Merge, arXiv 2603.06242, energy balancing.
    """
    if smoothing == "none" or s.numel() == 0:
        return s
    if smoothing == "average":
        return s.mean().expand_as(s)
    ratio = min(rho, float(s[0] / s[-1]))
    line = torch.linspace(ratio, 1.0, s.numel(), dtype=s.dtype, device=s.device)
    return line * (s.sum() / line.sum())


def default_smoothing(adapters: bool) -> Smoothing:
    """Returns DC-Merge's own: `average` for adapters, `none` for dense deltas."""
    return "average" if adapters else "none"


def check_smoothing(method: str, options: Mapping[str, Any], adapters: bool) -> None:
    """Raises ValueError where ρ is given but the smoothing is not linear."""
    smoothing = options.get("smoothing") or default_smoothing(adapters)
    if "rho" in options and smoothing != "linear":
        raise ValueError(f"{method}: rho belongs to smoothing='linear', but smoothing is {smoothing!r}")


def _low_rank(delta: TaskDelta) -> LowRank:
    if not isinstance(delta, LowRank):
        raise TypeError("a task announced as low-rank loaded as a dense tensor")
    return delta


def empty_result(tasks: Tasks, record: MergeRecord, factors: Factors) -> MergedDelta:
    """Returns the zero update of a parameter that no task changes."""
    sample = factors.u
    record.rank = 0
    record.notes.append("no task changes this parameter")
    m, n = tasks.shape
    return MergedDelta(LowRank(sample.new_zeros(m, 0), None, sample.new_zeros(n, 0)), record, factors)
