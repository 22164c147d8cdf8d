"""The rules that make rows of a merge: W_0 + λ D, with D made row by row or there already."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.reading import Read
from dirmerge.engine.rows import Made, RowRule, Rows, Step, counted
from dirmerge.errors import NonFiniteError
from dirmerge.methods.registry import RowForm
from dirmerge.planning import TensorPlan
from dirmerge.planning.costs import WHOLE_BYTES

Update = Tensor | LowRank


class FormedRows(RowRule):
    """Rows of W_0 + λ D by a method that can make each row of D by itself; see RowForm.

    Args:
        reader: of the plan's inputs.
        tensor: the tensor; every source of it has weights of its own.
        form: of the method.
        scale: λ.
    """

    def __init__(self, reader: DeltaReader, tensor: TensorPlan, form: RowForm, scale: float) -> None:
        super().__init__(reader, tensor)
        self._form = form
        self._scale = scale
        self._sources = [source for source in tensor.sources if source.weight != 0]
        self._select = None if form.threshold is None else form.threshold(tensor.options)
        self._size = sum(read.nbytes for read in self.reads(None, None))
        self._thresholds: list[Tensor | None] = [None] * len(self._sources)

    @property
    def _whole(self) -> bool:
        limit = WHOLE_BYTES if self.whole_bytes is None else self.whole_bytes
        return self._select is not None and self._size <= limit

    def rows(self) -> list[Rows]:
        """Returns the ranges of rows; all at once where a small tensor is needed whole."""
        return [(None, None)] if self._whole else super().rows()

    def preparations(self) -> list[Step]:
        """Returns a step per fine-tune that finds its threshold, where the tensors are large."""
        find = self._select
        if find is None or self._whole:
            return []
        base, *own = self.reads(None, None)

        def select(t: int, values: list[Tensor]) -> None:
            self._thresholds[t] = find(*values)

        return [
            Step(
                None,
                [base, read],
                lambda values, t=t: select(t, values),  # type: ignore[misc]
                base.nbytes + read.nbytes,
            )
            for t, read in enumerate(own)
        ]

    def reads(self, start: int | None, stop: int | None) -> list[Read]:
        """Returns the rows of the base and of all fine-tunes."""
        own = [self.reader.value_read(source, start, stop) for source in self._sources]
        return [self.reader.base_read(self.tensor.name, start, stop), *(read for read in own if read)]

    def make(self, values: list[Tensor], start: int | None, stop: int | None) -> Made:
        """Makes the rows in one pass over the stored ones."""
        base, *own = values
        thresholds: list[Tensor] = []
        if self._whole:
            assert self._select is not None  # only then all rows are needed at once
            thresholds = [self._select(base, value) for value in own]
        elif self._select is not None:
            thresholds = [part for part in self._thresholds if part is not None]
        stacked = torch.cat([part.to(_widest(thresholds)) for part in thresholds]) if thresholds else None
        weights = [source.weight for source in self._sources]
        return Made(*self._form.add(base, own, weights, self._scale, stacked, self.tensor.dtype))


class UpdatedRows(RowRule):
    """Rows of W_0 + λ D with updates D that are there, or are fetched when their first row is made.

    Args:
        reader: of the plan's inputs.
        tensor: the tensor.
        updates: what returns D in the shape of its matrix, by the number of the slice, or for None where the
            tensor is one matrix.
        scale: λ.
        base: W_0 where it has been read, in the shape of the tensor or of the only slice.
    """

    def __init__(
        self,
        reader: DeltaReader,
        tensor: TensorPlan,
        updates: Mapping[int | None, Callable[[], Update]],
        scale: float,
        base: Tensor | None = None,
    ) -> None:
        super().__init__(reader, tensor)
        self._scale = scale
        self._base = base
        self._slices = None not in updates
        self._shape = tensor.shape[1:] if self._slices else tensor.shape
        self._length = 1 if self._slices or not tensor.shape else tensor.shape[0]
        self._updates = {
            index: _Once(lambda fetch=fetch: _prepared(fetch(), self._shape), self._length)  # type: ignore[misc]
            for index, fetch in updates.items()
        }

    def rows(self) -> list[Rows]:
        """Returns the ranges of rows; a slice is one."""
        if not self._slices:
            return super().rows()
        return [(index, index + 1) for index in self._updates if index is not None]

    def reads(self, start: int | None, stop: int | None) -> list[Read]:
        """Returns the base's rows, where they have not been read."""
        return [] if self._base is not None else [self.reader.base_read(self.tensor.name, start, stop)]

    def make(self, values: list[Tensor], start: int | None, stop: int | None) -> Made:
        """Adds the rows of λ D and rounds once."""
        once = self._updates[start if self._slices else None]
        update = once.get()
        rows = slice(None) if self._slices or start is None else slice(start, stop)
        if self._base is not None:
            base = self._base.reshape(self._shape)[rows] if self._shape else self._base.reshape(())
        else:
            base = values[0].reshape(self._shape) if self._slices else values[0]
        if isinstance(update, LowRank):
            left, right = update.left[rows], update.right
            value = ops.lowrank_add(base, left, right, scale=self._scale, out_dtype=self.tensor.dtype)
        else:
            part = update[rows] if self._shape else update
            dtype = torch.promote_types(base.dtype, part.dtype)
            value = torch.add(base.to(dtype), part.to(dtype), alpha=self._scale).to(self.tensor.dtype)
        once.used(self._length if start is None or stop is None else stop - start)
        return counted(value[None] if self._slices else value)

    def blame(self, start: int | None, stop: int | None) -> NonFiniteError:
        """Returns the error for rows that are not finite, or raises it with the file that is to blame."""
        self._base = None
        return super().blame(start, stop)


class _Once:
    """A value that is made when it is first asked for, by whichever thread asks first.

    Args:
        make: makes it.
        rows: that are made from it; after the last it is let go of.
    """

    def __init__(self, make: Callable[[], Update], rows: int) -> None:
        self._make = make
        self._left = rows
        self._value: Update | None = None
        self._lock = threading.Lock()

    def get(self) -> Update:
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value

    def used(self, rows: int) -> None:
        with self._lock:
            self._left -= rows
            if self._left <= 0:
                self._value = None


def _prepared(update: Update, shape: tuple[int, ...]) -> Update:
    """Returns the update as it is added: two factors, or a tensor of the matrix's own shape."""
    if isinstance(update, LowRank):
        left, right = update.folded()
        return LowRank(left, None, right)
    return update.reshape(shape)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
