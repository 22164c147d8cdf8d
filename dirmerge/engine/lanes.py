"""Lanes: where items are done, the CPU or one GPU each, between the workers that read and write."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from dirmerge.checkpoints.hashing import InterruptedMergeError
from dirmerge.checkpoints.safetensors_reader import TensorInfo
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.compute import CPU
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.items import Item, ItemJobs, ReadJob
from dirmerge.engine.reading import InputFiles, Read
from dirmerge.engine.rows import Made, RowRule, Step
from dirmerge.engine.sinks import Sink
from dirmerge.engine.waiting import update_bytes
from dirmerge.engine.workers import Job, Workers
from dirmerge.planning import TensorPlan
from dirmerge.planning.costs import CHUNK_BYTES, WHOLE_BYTES
from dirmerge.planning.inputs import Input

# Rows that a GPU makes at a time, in float32: enough to fill it, few enough to overlap copies.
DEVICE_CHUNK_BYTES = 128 << 20


class Lane(Protocol):
    """Where items are done.

    Attributes:
        device: on which matrices are merged and rows are made.
        chunk_bytes: of rows that are made at a time, in float32; None for the default.
        whole_bytes: of tensors that are held whole where rows need that; None for the default.
    """

    device: torch.device
    chunk_bytes: int | None
    whole_bytes: int | None

    def take(self, job: ReadJob) -> list[Tensor]:
        """Waits for the job and returns its tensors, on the device; they are the caller's from now on."""

    def drop(self, job: ReadJob) -> None:
        """Lets go of a job whose tensors nobody asks for."""

    def begin(self, items: Iterable[Item]) -> None:
        """Gets ready for items, in their order."""

    def jobs(self, item: Item) -> Iterator[Job]:
        """Yields what the workers are fed with for an item."""

    def make_rows(self, item: Item) -> None:
        """Sees to it that the rows of an item are made and written."""

    def write_rows(self, rule: RowRule) -> None:
        """Makes and writes rows of an update that is there, while the next matrix is merged."""

    def write_module(self, tensor: TensorPlan, update: LowRank, scale: float) -> None:
        """Writes λ times the update of an adapter's module, while the next matrix is merged."""

    def close(self) -> None:
        """Ends what runs beside the caller."""


class Feed:
    """Hands the reads of one matrix to the thread that merges it.

    A tensor that is asked for again, by methods that look at their deltas twice, is kept where the reads of
    the matrix are few enough, and else read again; the base is always kept.

    Args:
        lane: that takes the jobs' results.
        jobs: the jobs of the matrix, in order.
        files: that they read.
        base: the input that is the base.
        keep: whether what was handed out is kept.
    """

    def __init__(
        self, lane: Lane, jobs: list[ReadJob], files: InputFiles, base: Input | None, *, keep: bool
    ) -> None:
        self._lane = lane
        self._files = files
        self._left = deque(jobs)
        self._kept = {
            _key(read.info, read.start, read.stop)
            for job in jobs
            for read in job.reads
            if keep or read.item is base
        }
        self._known = {_key(read.info, read.start, read.stop) for job in jobs for read in job.reads}
        self._here: dict[tuple[int, int | None, int | None], Tensor] = {}

    def read(self, info: TensorInfo, start: int | None = None, stop: int | None = None) -> Tensor:
        """Returns rows of a tensor that lies in a file; those that no job reads are read at once."""
        key = _key(info, start, stop)
        # In order, whatever is asked for: a job behind others might wait for the memory that they hold.
        while key not in self._here and key in self._known and self._left:
            job = self._left.popleft()
            reads = job.reads
            for read, value in zip(reads, self._lane.take(job), strict=True):
                self._here[_key(read.info, read.start, read.stop)] = value
        if key not in self._here:
            return self._files.read_again(info, start, stop).to(self._lane.device)
        return self._here[key] if key in self._kept else self._here.pop(key)

    def fetch(self, reader: DeltaReader, read: Read) -> Tensor:
        """Returns what a Read stands for, of a state dict too."""
        if read.info.file is not None:
            return self.read(read.info, read.start, read.stop)
        return reader.fetch(read).to(self._lane.device)

    def close(self) -> None:
        """Lets go of everything, also of what was never asked for."""
        for job in self._left:
            self._lane.drop(job)
        self._left.clear()
        self._known.clear()
        self._here.clear()


class HostLane:
    """The CPU: workers make the rows, the calling thread merges the matrices.

    Args:
        reader: of the plan's inputs.
        workers: that read, make rows and write.
        jobs: makes their jobs.
        sink: takes what is made.
    """

    def __init__(self, reader: DeltaReader, workers: Workers, jobs: ItemJobs, sink: Sink) -> None:
        self.device = CPU
        self.chunk_bytes: int | None = None
        self.whole_bytes: int | None = None
        self._reader = reader
        self._workers = workers
        self._jobs = jobs
        self._sink = sink

    def begin(self, items: Iterable[Item]) -> None:
        """Does nothing: nothing is to be got ready."""

    def jobs(self, item: Item) -> Iterator[Job]:
        """Yields jobs that read, make and write rows, or that read matrices."""
        if item.rule is None:
            yield from self._jobs.claimed(item)
            return
        for step in [*item.rule.preparations(), *item.rule.steps()]:
            yield self._jobs.step(item, item.rule, step, self._workers, self._put)

    def make_rows(self, item: Item) -> None:
        """Waits until the workers have made and written the rows."""
        self._workers.wait(item.made)

    def take(self, job: ReadJob) -> list[Tensor]:
        """Waits for the job and returns its tensors, which are the caller's from now on."""
        tensors: list[Tensor] = self._workers.result(job)
        self._workers.release(job)
        return tensors

    def drop(self, job: ReadJob) -> None:
        """Lets go of a job whose tensors nobody asks for."""
        self._workers.release(job)

    def write_rows(self, rule: RowRule) -> None:
        """Lets the workers make and write the rows."""
        for step in rule.steps():

            def make(step: Step = step) -> None:
                made = step.make([self._reader.fetch(read) for read in step.reads])
                assert made is not None  # a step of rows
                self._put(rule, step, made)

            self._workers.submit(Job(make, step.nbytes))

    def write_module(self, tensor: TensorPlan, update: LowRank, scale: float) -> None:
        """Lets the workers scale and write the update."""

        def write() -> None:
            self._sink.update(tensor, update.scaled(scale))

        self._workers.submit(Job(write, update_bytes(update)))

    def close(self) -> None:
        """Does nothing: nothing runs beside the workers."""

    def _put(self, rule: RowRule, step: Step, made: Made) -> None:
        assert step.rows is not None  # a step of rows
        if int(made.nonfinite):
            raise rule.blame(*step.rows)
        self._sink.write(rule.tensor, made.value, step.rows[0])


class DeviceLane:
    """A GPU: what the workers read is copied there ahead of the computation, results come back beside it.

    Three streams: copies in, computation, copies out. Nothing but the reads of flags waits for the device;
    the workers wait for the copies out before they write.

    Args:
        device: the GPU.
        reader: of the plan's inputs.
        workers: that read and write.
        jobs: makes their jobs.
        sink: takes what is made.
        ahead: bytes that may lie on the device before the computation takes them.
    """

    def __init__(
        self,
        device: torch.device,
        reader: DeltaReader,
        workers: Workers,
        jobs: ItemJobs,
        sink: Sink,
        ahead: int,
    ) -> None:
        self.device = device
        # Of T + 2 tensors of rows at a time, some are on their way while others are made.
        self.chunk_bytes: int | None = max(CHUNK_BYTES, min(DEVICE_CHUNK_BYTES, ahead // 8))
        # Reading twice would cost the bus more than holding costs memory.
        self.whole_bytes: int | None = max(WHOLE_BYTES, ahead)
        self._reader = reader
        self._workers = workers
        self._jobs = jobs
        self._sink = sink
        self._ahead = ahead
        self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._change = threading.Condition()
        self._queue: deque[ReadJob] = deque()
        self._staged: dict[int, tuple[list[Tensor], torch.cuda.Event]] = {}
        self._dropped: set[int] = set()
        self._held = 0
        self._ended = False
        self._thread = threading.Thread(target=self._stage_all, name=f"dirmerge-{device}", daemon=True)
        self._thread.start()
        workers.on_stop(self._stop)

    def begin(self, items: Iterable[Item]) -> None:
        """Copies the reads of the items to the device from now on, as they come and as there is room."""
        with self._change:
            self._queue.extend(job for item in items for jobs in item.jobs for job in jobs)
            self._change.notify_all()

    def jobs(self, item: Item) -> Iterator[Job]:
        """Yields the jobs that read."""
        return self._jobs.claimed(item)

    def make_rows(self, item: Item) -> None:
        """Makes the rows on the device; the workers write them."""
        rule = item.rule
        assert rule is not None  # an item of rows
        for step, jobs in zip(item.steps, item.jobs, strict=True):
            feed = Feed(self, jobs, self._jobs.files, None, keep=False)
            made = step.make([feed.fetch(self._reader, read) for read in step.reads])
            feed.close()
            if made is not None:
                self._put(rule, step, made)

    def take(self, job: ReadJob) -> list[Tensor]:
        """Returns the job's tensors on the device; the computation's stream waits for their copies."""
        with self._change:
            while id(job) not in self._staged and not self._ended:
                self._change.wait()
            found = self._staged.pop(id(job), None)
            if found is not None:
                self._held -= job.nbytes
                self._change.notify_all()
        # Outside the lock: who stops the workers holds theirs, and asks for ours in _stop.
        self._workers.check()
        if found is None:
            raise InterruptedMergeError  # the lane was closed
        tensors, copied = found
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(stream)
        return tensors

    def drop(self, job: ReadJob) -> None:
        """Lets go of a job whose tensors nobody asks for."""
        with self._change:
            if self._staged.pop(id(job), None) is None:
                self._dropped.add(id(job))
            else:
                self._held -= job.nbytes
            self._change.notify_all()

    def write_rows(self, rule: RowRule) -> None:
        """Makes the rows on the device; the workers write them."""
        for step in rule.steps():
            made = step.make([self._reader.fetch(read).to(self.device) for read in step.reads])
            assert made is not None  # a step of rows
            self._put(rule, step, made)

    def write_module(self, tensor: TensorPlan, update: LowRank, scale: float) -> None:
        """Scales and rounds the factors on the device; the workers write them."""
        left, right = (factor.to(tensor.dtype) for factor in update.scaled(scale).folded())
        (left, right), copied = self._to_host([left, right])

        def write() -> None:
            copied.synchronize()
            self._sink.update(tensor, LowRank(left, None, right))

        self._workers.submit(Job(write, left.nbytes + right.nbytes))

    def close(self) -> None:
        """Ends the copying thread."""
        self._stop()
        self._thread.join()

    def _put(self, rule: RowRule, step: Step, made: Made) -> None:
        assert step.rows is not None  # a step of rows
        start, stop = step.rows
        (value, nonfinite), copied = self._to_host([made.value, made.nonfinite])

        def write() -> None:
            copied.synchronize()
            if int(nonfinite):
                raise rule.blame(start, stop)
            self._sink.write(rule.tensor, value, start)

        self._workers.submit(Job(write, value.numel() * value.element_size()))

    def _to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        """Begins to copy tensors to pinned memory; they are there once the event has come."""
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        found = []
        with torch.cuda.stream(self._out):
            for tensor in tensors:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._out)
                found.append(host)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._out)
        return found, copied

    def _stage_all(self) -> None:
        try:
            with torch.cuda.device(self.device):
                while (job := self._next()) is not None:
                    self._stage(job)
        except BaseException as error:
            self._workers.fail(error)

    def _next(self) -> ReadJob | None:
        """Returns the next job to copy, when there is room for it."""
        with self._change:
            while not self._ended:
                if self._queue:
                    job = self._queue[0]
                    if not self._held or self._held + job.nbytes <= self._ahead:
                        self._held += job.nbytes
                        return self._queue.popleft()
                self._change.wait()
            return None

    def _stage(self, job: ReadJob) -> None:
        if id(job) not in self._dropped:
            values: list[Tensor] = self._workers.result(job)
            with torch.cuda.stream(self._in):
                tensors = [torch.empty(v.shape, dtype=v.dtype, device=self.device) for v in values]
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._in)
            with self._change:
                self._staged[id(job)] = tensors, copied
                self._change.notify_all()
            del values
        self._workers.release(job)
        with self._change:
            if id(job) in self._dropped:
                self._dropped.remove(id(job))
                self._staged.pop(id(job), None)
                self._held -= job.nbytes
                self._change.notify_all()

    def _stop(self) -> None:
        with self._change:
            self._ended = True
            self._change.notify_all()


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Makes a GPU the calling thread's own for a while; nothing for the CPU."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device):
        yield


def _key(info: TensorInfo, start: int | None, stop: int | None) -> tuple[int, int | None, int | None]:
    return id(info), start, stop
