"""What the spectral methods share: factors of all tasks, their cover spaces, energy balancing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank
from dirmerge.linalg import SVDMethod, TruncatedSVD, gram_root, kept_directions, polar, svd_truncated
from dirmerge.linalg.conditions import holds, is_deferred, number
from dirmerge.methods.tasks import Factors, MergedDelta, MergeRecord, Tasks

Smoothing = Literal["none", "average", "linear"]

# The ratio of singular values above which a frame stays a product: its square bounds the loss of accuracy.
FACTORED_FRAME = 0.25


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
            if triplets.method == "randomized" and not holds(triplets.gain <= svd_tolerance):
                factors.notes.append(
                    f"{tasks.names[t]}: power iteration {triplets.power_iterations}, the last, still gained "
                    f"{float(triplets.gain):.1e} of energy (svd_tolerance {svd_tolerance:.1e})"
                )
        keep = kept_directions(triplets.s, max(tasks.shape), rank)
        kept = triplets.truncated(keep)
        factors.energy.append(number(kept.energy))
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
    # Which of the two forms is better depends on values; the other one is right for all of them.
    gram = None if is_deferred(bases) else gram_root(bases)
    if gram is not None and gram.condition > FACTORED_FRAME:
        return Cover(bases, gram.inverse.to(bases.dtype), gram.root.to(bases.dtype))
    found = polar(bases, "exact" if svd == "exact" else "auto", complete=False)
    if found.fallback is not None:
        record.fallbacks.append(f"{side} cover space: {found.fallback}; exact form used")
    full = min(found.q.shape)
    if not holds(found.rank >= full):
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
    if is_deferred(s):
        line = 1 + ((s[0] / s[-1]).clamp(max=rho) - 1) * torch.linspace(
            1.0, 0.0, s.numel(), dtype=s.dtype, device=s.device
        )
        return line * (s.sum() / line.sum())
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


def empty_result(tasks: Tasks, record: MergeRecord, factors: Factors) -> MergedDelta:
    """Returns the zero update of a parameter that no task changes."""
    sample = factors.u
    record.rank = 0
    record.notes.append("no task changes this parameter")
    m, n = tasks.shape
    return MergedDelta(LowRank(sample.new_zeros(m, 0), None, sample.new_zeros(n, 0)), record, factors)
