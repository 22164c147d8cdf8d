"""A plan as items in the order of the output: rows that workers make, matrices that are merged, modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dirmerge.checkpoints.files import PIECE
from dirmerge.checkpoints.safetensors_reader import fresh_bytes
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.reading import InputFiles, Read
from dirmerge.engine.rows import Made, RowRule, Step
from dirmerge.engine.work import MatrixWork
from dirmerge.engine.workers import Group, Job, Workers
from dirmerge.planning import TensorPlan

if TYPE_CHECKING:
    from dirmerge.engine.lanes import Lane

Put = Callable[[RowRule, Step, Made], None]


class ReadJob(Job):
    """Reads rows of tensors, in their order, into memory of their own; its result is the list of them."""

    def __init__(self, files: InputFiles, reads: list[Read], *, pinned: bool = False) -> None:
        super().__init__(self._read, sum(read.nbytes for read in reads), kept=True)
        self.reads = reads
        self._files = files
        self._pinned = pinned

    def claim(self) -> ReadJob:
        """Takes its place in the order of hashing; called in the order in which jobs begin."""
        self.reads = [self._files.claim(read) for read in self.reads]
        return self

    def _read(self) -> list[Tensor]:
        return [self._files.read(read, self._memory(read)) for read in self.reads]

    def _memory(self, read: Read) -> Tensor | None:
        if not self._pinned:
            return None
        return torch.empty(read.nbytes, dtype=torch.uint8, pin_memory=True)


@dataclass
class Item:
    """One tensor of the output in one pass over the plan; with neither a rule nor work, nothing is done.

    Attributes:
        tensor: of the plan.
        lane: where it is done.
        rule: how its rows are made, where no method must see a matrix.
        prepared: what the workers do before they make its rows.
        made: what they do to make them.
        steps: of its rule, where a GPU makes the rows.
        work: its matrices, where the method must see them.
        jobs: what reads it: a list per step or per matrix; of a module, one.
    """

    tensor: TensorPlan
    lane: Lane
    rule: RowRule | None = None
    prepared: Group = field(default_factory=lambda: Group(0))
    made: Group = field(default_factory=lambda: Group(0))
    steps: list[Step] = field(default_factory=list)
    work: list[MatrixWork] = field(default_factory=list)
    jobs: list[list[ReadJob]] = field(default_factory=list)


class ItemJobs:
    """Makes the jobs of items.

    Args:
        reader: of the plan's inputs.
        files: that the jobs read.
        ahead: bytes of memory that jobs may leave to the next ones.
    """

    def __init__(self, reader: DeltaReader, files: InputFiles, ahead: int) -> None:
        self._reader = reader
        self.files = files
        self._buffers = _Buffers(ahead)

    def rows(self, tensor: TensorPlan, lane: Lane, rule: RowRule) -> Item:
        """Returns the item of a tensor that is made by rows."""
        if lane.device.type == "cpu":
            return Item(tensor, lane, rule, Group(len(rule.preparations())), Group(len(rule.rows())))
        steps = [*rule.preparations(), *rule.steps()]
        return Item(tensor, lane, rule, steps=steps, jobs=[self._reads(s.reads, lane) for s in steps])

    def matrices(self, tensor: TensorPlan, lane: Lane, work: list[MatrixWork], *, base: bool) -> Item:
        """Returns the item of a tensor that the method merges, with its reads.

        Args:
            tensor: the tensor.
            lane: where it is merged.
            work: its matrices.
            base: whether the base is read with each matrix although no delta needs it.
        """
        reads = [self._reader.matrix_reads(tensor, matrix.index, base=base) for matrix in work]
        return Item(tensor, lane, work=work, jobs=[self._reads(matrix, lane) for matrix in reads])

    def module(self, tensor: TensorPlan, lane: Lane) -> Item:
        """Returns the item of an adapter's module that a rule takes or averages."""
        reads = self._reader.matrix_reads(tensor, None, base=False)
        return Item(tensor, lane, jobs=[self._reads(reads, lane)])

    def claimed(self, item: Item) -> Iterator[Job]:
        """Yields the jobs that read an item, in their place among all reads."""
        for jobs in item.jobs:
            for job in jobs:
                yield job.claim()

    def step(self, item: Item, rule: RowRule, step: Step, workers: Workers, put: Put) -> Job:
        """Returns the job that reads for a step, makes its rows and hands them to `put`."""
        reads = [self.files.claim(read) for read in step.reads]

        def run() -> None:
            with self._buffers.borrow([read.nbytes for read in reads]) as buffers:
                values = [self.files.read(r, b) for r, b in zip(reads, buffers, strict=True)]
                if step.rows is not None:
                    workers.wait(item.prepared)
                made = step.make(values)
                if made is not None:
                    put(rule, step, made)

        return Job(run, step.nbytes, item.prepared if step.rows is None else item.made)

    def _reads(self, reads: list[Read], lane: Lane) -> list[ReadJob]:
        """Returns the jobs for those reads that are from files; small ones share a job."""
        jobs: list[list[Read]] = []
        size = 0
        for read in reads:
            if read.info.file is None:
                continue
            if not jobs or size + read.nbytes > PIECE:
                jobs.append([])
                size = 0
            jobs[-1].append(read)
            size += read.nbytes
        return [ReadJob(self.files, group, pinned=lane.device.type != "cpu") for group in jobs]


class _Buffers:
    """Memory that jobs use one after the other: fresh pages cost as much as a copy."""

    LARGEST = 4 * PIECE

    def __init__(self, total: int) -> None:
        self._total = total
        self._held = 0
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, sizes: list[int]) -> Iterator[list[Tensor]]:
        buffers = [self.take(size) for size in sizes]
        try:
            yield buffers
        finally:
            for buffer in buffers:
                self.give(buffer)

    def take(self, size: int) -> Tensor:
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if size <= buffer.numel() <= 2 * size + PIECE]
            if fitting:
                buffer = self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
                self._held -= buffer.numel() if buffer.numel() <= self.LARGEST else 0
                return buffer
            # Jobs with large buffers run alone, one after the other: what others have left must not come on
            # top of theirs, nor theirs on top of what follows.
            is_large = size > self.LARGEST
            self._free = [other for other in self._free if (other.numel() > self.LARGEST) is is_large]
            self._held = sum(other.numel() for other in self._free if not is_large)
        return fresh_bytes(size)

    def give(self, buffer: Tensor) -> None:
        size = buffer.numel()
        with self._lock:
            if size > self.LARGEST:
                self._free.append(buffer)
            elif self._held + size <= self._total:
                self._free.append(buffer)
                self._held += size
