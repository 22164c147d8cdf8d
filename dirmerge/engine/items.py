"""A plan as items in the order of the output: rows that workers make, matrices that are merged, modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dirmerge.checkpoints.safetensors_io import PIECE, TensorInfo
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.reading import InputFiles, Read
from dirmerge.engine.rules import Made, RowRule, Step
from dirmerge.engine.work import MatrixWork
from dirmerge.engine.workers import Group, Job, Workers
from dirmerge.planning import TensorPlan

Put = Callable[[RowRule, Step, Made], None]
Key = tuple[int, int | None, int | None]


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


class Feed:
    """Hands the reads of one matrix to the thread that merges it.

    A tensor that is asked for again, by methods that look at their deltas twice, is kept where the reads of
    the matrix are few enough, and else read again.

    Args:
        workers: that do the jobs.
        jobs: the jobs of the matrix, in order.
        keep: whether what was taken is kept.
    """

    def __init__(self, workers: Workers, jobs: list[ReadJob], *, keep: bool) -> None:
        self._workers = workers
        self._keep = keep
        self._jobs = {_key(read): (job, i) for job in jobs for i, read in enumerate(job.reads)}
        self._open = {id(job): len(job.reads) for job in jobs}
        self._taken: dict[Key, Tensor] = {}

    def read(self, info: TensorInfo, start: int | None = None, stop: int | None = None) -> Tensor | None:
        """Returns rows of a tensor, None for what no job reads or has been let go."""
        key = (id(info), start, stop)
        if key in self._taken:
            return self._taken[key]
        found = self._jobs.pop(key, None)
        if found is None:
            return None
        job, i = found
        value: Tensor = self._workers.result(job)[i]
        self._close(job)
        if self._keep:
            self._taken[key] = value
        return value

    def close(self) -> None:
        """Lets go of everything, also of what was never asked for."""
        for job, _ in self._jobs.values():
            self._close(job)
        self._jobs = {}
        self._taken = {}

    def _close(self, job: ReadJob) -> None:
        self._open[id(job)] -= 1
        if not self._open[id(job)]:
            self._workers.release(job)


@dataclass
class Item:
    """One tensor of the output in one pass over the plan; with neither a rule nor work, nothing is done.

    Attributes:
        tensor: of the plan.
        rule: how its rows are made, where workers can make them.
        prepared: the steps before its rows.
        made: the steps that make them.
        work: its matrices, where the method must see them.
        jobs: per matrix what reads it; of a module, one list.
        module: whether it is an adapter's module that a rule takes or averages.
    """

    tensor: TensorPlan
    rule: RowRule | None = None
    prepared: Group = field(default_factory=lambda: Group(0))
    made: Group = field(default_factory=lambda: Group(0))
    work: list[MatrixWork] = field(default_factory=list)
    jobs: list[list[ReadJob]] = field(default_factory=list)
    module: bool = False


class Items:
    """Makes items and the jobs that the workers are fed with.

    Args:
        reader: of the plan's inputs.
        files: that it reads.
        pinned: whether reads go to pinned memory, from which a GPU copies without waiting.
    """

    def __init__(self, reader: DeltaReader, files: InputFiles, *, pinned: bool = False) -> None:
        self._reader = reader
        self._files = files
        self._pinned = pinned
        self._buffers = _Buffers()

    def rows(self, tensor: TensorPlan, rule: RowRule) -> Item:
        """Returns the item of a tensor that is made by rows."""
        return Item(tensor, rule, Group(len(rule.preparations())), Group(len(rule.rows())))

    def matrices(self, tensor: TensorPlan, work: list[MatrixWork], *, base: bool) -> Item:
        """Returns the item of a tensor that the method merges, with its reads.

        Args:
            tensor: the tensor.
            work: its matrices.
            base: whether the base is read with each matrix although no delta needs it.
        """
        jobs = [self.read_jobs(self._reader.matrix_reads(tensor, matrix.index, base=base)) for matrix in work]
        return Item(tensor, work=work, jobs=jobs)

    def module(self, tensor: TensorPlan) -> Item:
        """Returns the item of an adapter's module that a rule takes or averages."""
        return Item(
            tensor,
            jobs=[self.read_jobs(self._reader.matrix_reads(tensor, None, base=False))],
            module=True,
        )

    def read_jobs(self, reads: list[Read]) -> list[ReadJob]:
        """Returns the jobs for those reads that are from files; small ones share a job."""
        jobs: list[list[Read]] = []
        size = PIECE
        for read in reads:
            if read.info.file is None:
                continue
            if size + read.nbytes > PIECE:
                jobs.append([])
                size = 0
            jobs[-1].append(read)
            size += read.nbytes
        return [ReadJob(self._files, group, pinned=self._pinned) for group in jobs]

    def host_jobs(self, items: Iterable[Item], workers: Workers, put: Put) -> Iterator[Job]:
        """Yields the jobs of items in order: rows are read, made and handed to `put` in one job each."""
        for item in items:
            if item.rule is not None:
                for step in item.rule.preparations():
                    yield self._step_job(item, item.rule, step, workers, put)
                for step in item.rule.steps():
                    yield self._step_job(item, item.rule, step, workers, put)
            for jobs in item.jobs:
                for job in jobs:
                    yield job.claim()

    def _step_job(self, item: Item, rule: RowRule, step: Step, workers: Workers, put: Put) -> Job:
        reads = [self._files.claim(read) for read in step.reads]

        def run() -> None:
            with self._buffers.borrow([read.nbytes for read in reads]) as buffers:
                values = [self._files.read(r, b) for r, b in zip(reads, buffers, strict=True)]
                if step.rows is not None:
                    workers.wait(item.prepared)
                made = step.make(values)
                if made is not None:
                    put(rule, step, made)

        return Job(run, step.nbytes, item.prepared if step.rows is None else item.made)


class _Buffers:
    """Memory that jobs use one after the other: fresh pages cost as much as a copy."""

    LARGEST = 2 * PIECE

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    class _Loan:
        def __init__(self, pool: _Buffers, sizes: list[int]) -> None:
            self.pool = pool
            self.buffers = [pool.take(size) for size in sizes]

        def __enter__(self) -> list[Tensor]:
            return self.buffers

        def __exit__(self, *error: object) -> None:
            for buffer in self.buffers:
                self.pool.give(buffer)

    def borrow(self, sizes: list[int]) -> _Loan:
        return self._Loan(self, sizes)

    def take(self, size: int) -> Tensor:
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if size <= buffer.numel() <= 2 * size + PIECE]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].numel()))
        return torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        if buffer.numel() <= self.LARGEST:
            with self._lock:
                self._free.append(buffer)


def _key(read: Read) -> Key:
    return id(read.info), read.start, read.stop
