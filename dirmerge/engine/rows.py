"""The rules that make a tensor of the output row by row without a method: copies, means and linear sums."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.backends import FLOATING
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.deltas import DeltaReader, check_finite, difference, row_range
from dirmerge.engine.reading import Read
from dirmerge.errors import MismatchError, NonFiniteError
from dirmerge.planning import Source, TensorPlan
from dirmerge.planning.costs import CHUNK_BYTES

Rows = tuple[int | None, int | None]


class Made(NamedTuple):
    """Rows of the output.

    Attributes:
        value: the rows, in the output's dtype.
        nonfinite: how many of their entries, or of those they were made from, are NaN or infinite, as far as
            that is an error; 0-dim, on the device of the value.
    """

    value: Tensor
    nonfinite: Tensor


@dataclass(frozen=True)
class Step:
    """One part of a rule: reads rows and makes rows of them.

    Attributes:
        rows: the rows that are made; None where the step only prepares others.
        reads: what it needs, in order.
        make: makes the rows from the values read; returns None where it prepares.
        nbytes: what it holds in memory.
    """

    rows: Rows | None
    reads: list[Read]
    make: Callable[[list[Tensor]], Made | None]
    nbytes: int


class RowRule:
    """How the rows of one tensor are made; a subclass per kind of rule.

    Args:
        reader: of the plan's inputs.
        tensor: the tensor.

    Attributes:
        chunk_bytes: about which size in float32 rows are made at a time; None for the default.
        whole_bytes: up to which size the tensors are read at once by a rule that needs them whole; None for
            the default.
    """

    chunk_bytes: int | None = None
    whole_bytes: int | None = None

    def __init__(self, reader: DeltaReader, tensor: TensorPlan) -> None:
        self.reader = reader
        self.tensor = tensor

    def rows(self) -> list[Rows]:
        """Returns the ranges of rows that are made one by one."""
        return list(row_chunks(self.tensor.shape, size=self.chunk_bytes))

    def preparations(self) -> list[Step]:
        """Returns the steps that must have ended before any row is made."""
        return []

    def steps(self) -> Iterator[Step]:
        """Yields the steps that make the rows."""
        for rows in self.rows():
            reads = self.reads(*rows)
            size = _rows_numel(self.tensor.shape, rows) * self.tensor.dtype.itemsize
            nbytes = sum(read.nbytes for read in reads) + size
            yield Step(rows, reads, lambda values, rows=rows: self.make(values, *rows), nbytes)  # type: ignore[misc]

    def reads(self, start: int | None, stop: int | None) -> list[Read]:
        """Returns what is read for rows start:stop."""
        raise NotImplementedError

    def make(self, values: list[Tensor], start: int | None, stop: int | None) -> Made:
        """Makes rows start:stop from what was read for them."""
        raise NotImplementedError

    def blame(self, start: int | None, stop: int | None) -> NonFiniteError:
        """Returns the error for rows that are not finite, or raises it with the file that is to blame."""
        reads = self.reads(start, stop)
        base: Tensor | None = None
        for read in reads:
            value = check_finite(self.reader.fetch(read), read.info, read.item)
            if read.item is self.reader.inputs.base:
                base = value
            elif base is not None and base.shape == value.shape:
                difference(value, base, read.info, read.item)
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return NonFiniteError(
            f"{self.tensor.name}: the merged tensor is not finite in {dtype}; choose a wider out_dtype or a "
            "smaller scale"
        )


class CopiedRows(RowRule):
    """Rows of the base, or of one fine-tune (rule `take`) with what its adapter adds."""

    def __init__(self, reader: DeltaReader, tensor: TensorPlan, source: Source | None) -> None:
        super().__init__(reader, tensor)
        self.source = source
        self._updates = _Updates(reader, [] if source is None else [source])

    def reads(self, start: int | None, stop: int | None) -> list[Read]:
        """Returns the one read."""
        own = None if self.source is None else self.reader.value_read(self.source, start, stop)
        return [own or self.reader.base_read(self.tensor.name, start, stop)]

    def make(self, values: list[Tensor], start: int | None, stop: int | None) -> Made:
        """Rounds the rows to the output's dtype; the base's are taken as they are, NaN or not."""
        (value,) = values
        if self.source is None:
            return Made(value.to(self.tensor.dtype), value.new_zeros((), dtype=torch.int64))
        update = self._updates.get(value.device).get(self.source.task)
        if update is not None:
            value = value + row_range(update, start, stop).dense()  # in the wider dtype of the two
        return counted(value.to(self.tensor.dtype))


class IdenticalRows(RowRule):
    """Rows of integers, on which all inputs must agree."""

    def reads(self, start: int | None, stop: int | None) -> list[Read]:
        """Returns the rows of every input that has them."""
        first = [self.reader.base_read(self.tensor.name, start, stop)] if self.tensor.in_base else []
        others = [self.reader.value_read(source, start, stop) for source in self.tensor.sources]
        return first + [read for read in others if read is not None]

    def make(self, values: list[Tensor], start: int | None, stop: int | None) -> Made:
        """Returns the rows; MismatchError where two inputs differ."""
        reads = self.reads(start, stop)
        for read, value in zip(reads[1:], values[1:], strict=True):
            if not torch.equal(values[0], value):
                first = "the base" if self.tensor.in_base else reads[0].item.label
                name = self.tensor.name
                raise MismatchError(
                    f"{name}: integers differ between {first} and {read.item.label}; choose one with "
                    f'`- {{match: "{name}", rule: base}}` under `tensors:`'
                )
        return Made(values[0].to(self.tensor.dtype), values[0].new_zeros((), dtype=torch.int64))


class SummedRows(RowRule):
    """Rows of W_0 + Σ_t c_t (W_t − W_0), without a base of Σ_t c_t W_t: a mean, or a linear method.

    Args:
        reader: of the plan's inputs.
        tensor: the tensor.
        coefficients: c_t by source.
    """

    def __init__(self, reader: DeltaReader, tensor: TensorPlan, coefficients: Sequence[float]) -> None:
        super().__init__(reader, tensor)
        pairs = zip(tensor.sources, coefficients, strict=True)
        self._terms = [(source, c) for source, c in pairs if source.weight != 0]
        self._updates = _Updates(reader, [source for source, _ in self._terms])

    def rows(self) -> list[Rows]:
        """Returns the ranges of rows, none across the first row that not all models have."""
        return list(row_chunks(self.tensor.shape, self.tensor.rows, self.chunk_bytes))

    def reads(self, start: int | None, stop: int | None) -> list[Read]:
        """Returns the base's rows and those of the fine-tunes that have their own."""
        first = [self.reader.base_read(self.tensor.name, start, stop)] if self.tensor.in_base else []
        if self._is_base(start):
            return first
        others = [self.reader.value_read(source, start, stop) for source, _ in self._terms]
        return first + [read for read in others if read is not None]

    def make(self, values: list[Tensor], start: int | None, stop: int | None) -> Made:
        """Sums in one pass over the stored rows; where an adapter takes part, part by part in float32."""
        base, own = (values[0], values[1:]) if self.tensor.in_base else (None, values)
        if self._is_base(start):
            assert base is not None  # only a base has rows that not all models have
            return Made(base.to(self.tensor.dtype), base.new_zeros((), dtype=torch.int64))
        dense = [(s, c) for s, c in self._terms if self.reader.has_value(s)]
        lows = self._updates.get(values[0].device)
        dtypes = [value.dtype for value in values]
        if not lows and own and all(dtype in FLOATING for dtype in [*dtypes, self.tensor.dtype]):
            return Made(*ops.delta_add(base, own, [c for _, c in dense], out_dtype=self.tensor.dtype))
        by_task = {s.task: value for (s, _), value in zip(dense, own, strict=True)}
        total: Tensor | None = None
        for source, coefficient in self._terms:
            update = lows.get(source.task)
            rows = None if update is None else row_range(update, start, stop)
            part = self.reader.combine(by_task.get(source.task), base, rows).mul_(coefficient)
            if total is not None:
                part = total.to(torch.promote_types(total.dtype, part.dtype)).add_(part)
            total = part
        assert total is not None  # the plan refuses weights that are all 0
        value = total if base is None else base + total  # in the wider dtype of the two
        return counted(value.to(self.tensor.dtype))

    def _is_base(self, start: int | None) -> bool:
        return self.tensor.rows is not None and start is not None and start >= self.tensor.rows


def row_chunks(shape: Sequence[int], common: int | None = None, size: int | None = None) -> Iterator[Rows]:
    """Yields row ranges of about `size` bytes in float32, none across row `common`; (None, None) is all.

    With `common` the ranges are always explicit: a fine-tune may have more rows than the base.
    """
    rows = shape[0] if shape else 1
    step = max(1, (size or CHUNK_BYTES) // max(1, 4 * math.prod(shape[1:])))
    if not shape or (step >= rows and common is None):
        yield None, None
        return
    edge = rows if common is None else common
    for begin, end in ((0, edge), (edge, rows)):
        for start in range(begin, end, step):
            yield start, min(start + step, end)


def counted(value: Tensor) -> Made:
    """Returns the rows with the number of entries that are not finite."""
    if not value.is_floating_point():
        return Made(value, value.new_zeros((), dtype=torch.int64))
    return Made(value, value.numel() - value.isfinite().count_nonzero())


class _Updates:
    """The updates of the adapters among the sources of a tensor, read when they are first asked for."""

    def __init__(self, reader: DeltaReader, sources: Sequence[Source]) -> None:
        self._reader = reader
        self._sources = [s for s in sources if s.module is not None and s.saved is None]
        self._found: dict[int, LowRank] | None = None
        self._lock = threading.Lock()

    def get(self, device: torch.device) -> dict[int, LowRank]:
        with self._lock:
            if self._found is None:
                self._found = {s.task: self._reader.low_rank(s, device) for s in self._sources}
            return self._found


def _rows_numel(shape: Sequence[int], rows: Rows) -> int:
    start, stop = rows
    if start is None or stop is None:
        return math.prod(shape)
    return (stop - start) * math.prod(shape[1:])
