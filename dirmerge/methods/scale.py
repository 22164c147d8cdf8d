"""The scale λ of a merged update: defaults by setting, and λ from the data-free alignment a(D)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from dirmerge.deltas.lowrank import LowRank
from dirmerge.linalg import single_thread
from dirmerge.linalg.conditions import number, read
from dirmerge.methods.spectral import factor_tasks
from dirmerge.methods.tasks import Factors, MergedDelta, Tasks, kept_ranks


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


class AlignmentTerms(NamedTuple):
    """The two sums of an alignment a(D) = numerator / denominator, of one matrix or of several.

    Where decisions are deferred, both are 0-d tensors until they are read (see `linalg.conditions.number`).

    Attributes:
        numerator: Σ_t ⟨U_tᵀ D V_t, B_t⟩.
        denominator: Σ_t ‖B_t‖²_F.
    """

    numerator: float = 0.0
    denominator: float = 0.0

    @classmethod
    def total(cls, terms: Iterable[AlignmentTerms]) -> AlignmentTerms:
        """Returns the sums over matrices, added in the given order: the order decides the last bits."""
        numerator = denominator = 0.0
        for term in terms:
            numerator += term.numerator
            denominator += term.denominator
        return cls(numerator, denominator)

    @property
    def value(self) -> float | None:
        """a(D), None where all deltas are zero."""
        return self.numerator / self.denominator if self.denominator > 0 else None

    def scale_for(self, target: float) -> float:
        """Returns λ = target / a(D); 1 when all deltas are zero.

        Raises:
            ValueError: when the update is not aligned with the tasks at all (numerator <= 0).
        """
        if self.denominator == 0:
            return 1.0
        if self.numerator <= 1e-12 * self.denominator:
            raise ValueError(
                f"the merged update reproduces none of the tasks (alignment "
                f"{self.numerator / self.denominator:.1e}): no scale reaches the target {target}; give a raw "
                "scale instead"
            )
        return target * self.denominator / self.numerator


def alignment_terms(tasks: Tasks, merged: MergedDelta, seed: int = 0) -> AlignmentTerms:
    """Computes the two sums of a(D) = Σ_t ⟨U_tᵀ D V_t, B_t⟩ / Σ_t ‖B_t‖²_F over the tasks' leading cores B_t.

    a(D) is the mean fraction of each task's leading component that D reproduces; it is linear in D. Over a
    whole model the numerators and the denominators are summed first, so that one λ = target / a(D) serves
    all parameters.

    Tasks count alike whatever their weight, so that equal factors on all weights cancel; those of weight 0
    do not count.

    Args:
        tasks: the deltas that were merged.
        merged: their merged update D.
        seed: of a randomized SVD, where the method did not leave its factors behind.

    Returns:
        Both sums, 0 when all deltas are zero.

    Source:
        this project: raw λ spans a factor of eight between methods, a(λD) at the best λ hardly moves within
        one setting.
    """
    present = [t for t, weight in enumerate(merged.record.weights) if weight != 0]
    tasks = tasks.subset(present)
    factors = merged.factors
    wanted = kept_ranks(tasks)
    if factors is None or any(have < want for have, want in zip(factors.asked, wanted, strict=True)):
        factors = factor_tasks(tasks, wanted, "auto", 1e-2, seed)
    with single_thread(tasks.width):
        return _terms(factors, wanted, merged)


def _terms(factors: Factors, ranks: list[int], merged: MergedDelta) -> AlignmentTerms:
    if isinstance(merged.value, LowRank):
        value = merged.value
        left, right = factors.u.mT @ value.left, factors.v.mT @ value.right
        diagonal = ((left if value.core is None else left @ value.core) * right).sum(1)
    else:
        diagonal = ((factors.u.mT @ merged.value) * factors.v.mT).sum(1)
    numerator = denominator = 0.0
    for block, s, rank in zip(factors.blocks(), factors.s, ranks, strict=True):
        leading = s[:rank].double()
        numerator += number((leading * diagonal[block][:rank].double()).sum())
        denominator += number(leading.square().sum())
    return AlignmentTerms(numerator, denominator)


def align(tasks: Tasks, merged: MergedDelta, target: float, seed: int = 0) -> MergedDelta:
    """Returns λ D with λ = target / a(D).

    Raises:
        ValueError: when a(D) is not positive, so that no λ reaches the target.
    """
    terms = AlignmentTerms(*read(alignment_terms(tasks, merged, seed)))
    if terms.value is None:
        merged.record.notes.append("all deltas are zero: λ has no effect")
        return merged
    merged.record.alignment = terms.value
    return merged.scaled(terms.scale_for(target))
