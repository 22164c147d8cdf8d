"""The data-free scale: how much of each task's own leading component a merged update reproduces."""

from __future__ import annotations

from dirmerge.linalg import single_thread
from dirmerge.lowrank import LowRank
from dirmerge.methods.common import Factors, MergedDelta, Tasks, factor_tasks, kept_ranks


def alignment_terms(tasks: Tasks, merged: MergedDelta, seed: int = 0) -> tuple[float, float]:
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
        (numerator, denominator); (0, 0) when all deltas are zero.

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


def _terms(factors: Factors, ranks: list[int], merged: MergedDelta) -> tuple[float, float]:
    if isinstance(merged.value, LowRank):
        value = merged.value
        left, right = factors.u.mT @ value.left, factors.v.mT @ value.right
        diagonal = ((left if value.core is None else left @ value.core) * right).sum(1)
    else:
        diagonal = ((factors.u.mT @ merged.value) * factors.v.mT).sum(1)
    numerator = denominator = 0.0
    for block, s, rank in zip(factors.blocks(), factors.s, ranks, strict=True):
        leading = s[:rank].double()
        numerator += float((leading * diagonal[block][:rank].double()).sum())
        denominator += float(leading.square().sum())
    return numerator, denominator


def align(tasks: Tasks, merged: MergedDelta, target: float, seed: int = 0) -> MergedDelta:
    """Returns λ D with λ = target / a(D).

    Raises:
        ValueError: when a(D) is not positive, so that no λ reaches the target.
    """
    numerator, denominator = alignment_terms(tasks, merged, seed)
    if denominator == 0:
        merged.record.notes.append("all deltas are zero: λ has no effect")
        return merged
    merged.record.alignment = numerator / denominator
    return merged.scaled(scale_for(numerator, denominator, target))


def scale_for(numerator: float, denominator: float, target: float) -> float:
    """Returns λ = target · denominator / numerator; 1 when all deltas are zero.

    Raises:
        ValueError: when the update is not aligned with the tasks at all (numerator <= 0).
    """
    if denominator == 0:
        return 1.0
    if numerator <= 1e-12 * denominator:
        raise ValueError(
            f"the merged update reproduces none of the tasks (alignment {numerator / denominator:.1e}): no "
            f"scale reaches the target {target}; give a raw scale instead"
        )
    return target * denominator / numerator
