"""Estimates of what a tensor costs: floating-point operations, and the memory it alone needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dirmerge.methods import Method
from dirmerge.planning.tensor_plan import TensorPlan

CHUNK_BYTES = 8 << 20
"""Rows are read, made and written in chunks of about this size in float32: a few fit a CPU's cache."""

WHOLE_BYTES = 128 << 20
"""A method that needs whole tensors before it can make a row reads all of them at once up to this size, and
beyond it one fine-tune at a time, and all once more by rows."""


class MergeCost(NamedTuple):
    """What merging one tensor costs.

    Attributes:
        flops: floating-point operations.
        peak_bytes: of memory.
        rank: of the merged update, None for a dense one.
        slices: number of matrices of a stack, None for one matrix.
        notes: facts worth knowing.
    """

    flops: float
    peak_bytes: int
    rank: int | None
    slices: int | None
    notes: tuple[str, ...]


def merge_cost(draft: TensorPlan, method: Method, options: Mapping[str, Any], by_rows: bool) -> MergeCost:
    """Returns what merging a tensor costs.

    Args:
        draft: the tensor with its sources.
        method: that merges it.
        options: of the method, as given for this tensor.
        by_rows: whether the rows are made one by one where the method and the sources allow it: λ is known.
    """
    matrix, slices = as_matrix(draft.shape, method.elementwise)
    active = [source for source in draft.sources if source.weight != 0]
    ranks = [source.rank for source in active]
    flops, peak, rank = method.cost(matrix, len(active), ranks, {**method.options, **options})
    loaded = max((source.dtype.itemsize for source in draft.sources if source.dtype is not None), default=0)
    peak += math.prod(matrix) * (loaded + 2 * draft.dtype.itemsize)
    notes: tuple[str, ...] = ()
    dense = draft.in_base and all(source.module is None for source in active)
    if by_rows and dense and method.rows is not None:
        peak = mean_bytes(draft)
        if method.rows.threshold is not None and method.rows.threshold(options) is not None:
            stored = draft.numel * (loaded or draft.dtype.itemsize)
            whole = (len(active) + 1) * stored
            if whole > WHOLE_BYTES:
                notes = ("is read twice: it is too large to be held for all models at once",)
            peak += min(whole, max(WHOLE_BYTES, 2 * stored))
    return MergeCost(flops * (slices or 1), peak, rank, slices, notes)


def mean_bytes(draft: TensorPlan) -> int:
    """Returns the memory that a mean needs: it is taken over chunks of rows."""
    return min(6 * 4 * draft.numel, 6 * CHUNK_BYTES)


def as_matrix(shape: tuple[int, ...], elementwise: bool) -> tuple[tuple[int, int], int | None]:
    """Returns the matrix that a method sees of a tensor, and the number of them for a stack."""
    if elementwise:
        if len(shape) < 2:
            return (1, math.prod(shape)), None
        return (shape[0], math.prod(shape[1:])), None
    if len(shape) == 3:
        return (shape[1], shape[2]), shape[0]
    return (shape[0], shape[1]), None
