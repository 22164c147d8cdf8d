"""The matrices of a plan, and their merge by the plan's method into updates and alignment terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.deltas import DeltaReader
from dirmerge.linalg import seed_for
from dirmerge.linalg.conditions import optimistic
from dirmerge.methods import AlignmentTerms, MergedDelta, merge_tasks
from dirmerge.methods.scale import alignment_terms
from dirmerge.planning import Plan, TensorPlan


@dataclass(frozen=True)
class MatrixWork:
    """One matrix to merge: a tensor, or one slice of a stack.

    Attributes:
        tensor: of the plan.
        index: number of the slice, None for a tensor that is one matrix.
        method: name of the method.
        seed: of randomized parts; it depends on the matrix's name and the recipe's seed alone.
        align: whether the alignment terms are wanted.
    """

    tensor: TensorPlan
    index: int | None
    method: str
    seed: int
    align: bool = False

    @property
    def name(self) -> str:
        """The tensor's name, with the number of the slice in a stack."""
        return self.tensor.name if self.index is None else f"{self.tensor.name}[{self.index}]"

    @property
    def rows(self) -> tuple[int | None, int | None]:
        """The rows of the tensor that are this matrix; (None, None) is all."""
        return (None, None) if self.index is None else (self.index, self.index + 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape by which matrices are batched: that of the tensor, or of a slice."""
        return self.tensor.shape if self.index is None else self.tensor.shape[1:]


@dataclass(eq=False)
class MergedMatrix:
    """The merge of one matrix.

    Attributes:
        work: what was merged.
        merged: the update, before λ, without the factors that led to it.
        terms: of its alignment; zeros where they were not wanted.
        is_repeated: whether the device's first run took something for granted that did not hold (full rank,
            finite values, convergence), so that the matrix was merged again with decisions on the host.
    """

    work: MatrixWork
    merged: MergedDelta
    terms: AlignmentTerms
    is_repeated: bool = False


def matrices(plan: Plan, tensor: TensorPlan, *, align: bool = False) -> list[MatrixWork]:
    """Returns the matrices of a tensor: one, or one per slice of a stack.

    Args:
        plan: that the tensor is of.
        tensor: of rule `merge`.
        align: whether the alignment terms are wanted.
    """
    method = plan.method_name
    if tensor.slices is None:
        return [MatrixWork(tensor, None, method, tensor.seed, align)]
    seeds = [seed_for(f"{tensor.name}[{index}]", plan.seed) for index in range(tensor.slices)]
    return [MatrixWork(tensor, index, method, seed, align) for index, seed in enumerate(seeds)]


def merge_matrices(
    work: Sequence[MatrixWork], reader: DeltaReader, device: torch.device, *, on_cpu: bool = False
) -> list[MergedMatrix]:
    """Merges a batch of matrices of one shape; the result depends on nothing but the deltas and the work.

    On a device nothing waits before the end of the batch: then one copy to the host brings all conditions and
    numbers (see `linalg.conditions`), and the matrices whose conditions do not hold are merged again.

    Args:
        work: matrices of one shape; a batch of one is the usual case on a CPU.
        reader: loads the deltas.
        device: on which everything after reading happens, and on which the updates are returned.
        on_cpu: whether decisions are deferred on a CPU as they are on a device.

    Returns:
        One result per matrix, in order.

    Raises:
        NonFiniteError: NaN or Inf in an input, with file and tensor.
        CheckpointError: a file that cannot be read any more.
    """
    if device.type == "cpu" and not on_cpu:
        return [_merge(item, reader, device) for item in work]
    runs = [partial(_merge, item, reader, device) for item in work]
    results, repeated = optimistic(runs, _numbers, _with, on_cpu=on_cpu)
    return [replace(result, is_repeated=again) for result, again in zip(results, repeated, strict=True)]


def _merge(item: MatrixWork, reader: DeltaReader, device: torch.device) -> MergedMatrix:
    tasks, weights = reader.tasks(item.tensor, item.index, device)
    merged = merge_tasks(tasks, item.method, weights, item.tensor.options, item.seed)
    terms = alignment_terms(tasks, merged, item.seed) if item.align else AlignmentTerms()
    merged.factors = None  # the alignment is all they are still needed for
    return MergedMatrix(item, merged, terms)


def _numbers(found: MergedMatrix) -> list[float]:
    return [*found.terms, *found.merged.record.energy]


def _with(found: MergedMatrix, numbers: Sequence[float]) -> MergedMatrix:
    numerator, denominator, *found.merged.record.energy = numbers
    return replace(found, terms=AlignmentTerms(numerator, denominator))


def smaller(merged: MergedDelta) -> Tensor | LowRank:
    """Returns the update in whichever form has fewer numbers; a LowRank without its core."""
    low = merged.low_rank()
    if low is None:
        return merged.dense()
    (m, n), k = low.shape, low.rank
    if (m + n) * k >= m * n:
        return low.dense()
    left, right = low.folded()
    return LowRank(left, None, right)
