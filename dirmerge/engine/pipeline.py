"""Runs a plan: reads, merges and writes at the same time, in bounded memory.

Workers read ahead, hash what passes, make the tensors that need no matrix row by row, and write; the calling
thread merges matrices meanwhile, in the plan's order. What may wait between the stages is bounded in bytes.
Nothing grows with the number of tensors: merged updates that wait for λ wait on disk, or in memory where a
budget allows it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from dirmerge.checkpoints.output import OutputFolder
from dirmerge.checkpoints.side_files import copy_side_files
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.card import write_documents
from dirmerge.engine.compute import Budget, Compute
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.items import Item, ItemJobs, ReadJob
from dirmerge.engine.lanes import DeviceLane, Feed, HostLane, Lane, on_device
from dirmerge.engine.merged_rows import UpdatedRows
from dirmerge.engine.reading import InputFiles
from dirmerge.engine.result import MergeResult, Progress, ProgressCallback, TensorRecord
from dirmerge.engine.rows import RowRule
from dirmerge.engine.rules import check_inputs, row_rule
from dirmerge.engine.sinks import MemorySink, Sink, open_sink
from dirmerge.engine.tokenizer import finish_tokenizer
from dirmerge.engine.waiting import WaitingUpdates
from dirmerge.engine.work import MatrixWork, MergedMatrix, matrices, merge_matrices, smaller
from dirmerge.engine.workers import Job, Workers
from dirmerge.errors import RecipeError
from dirmerge.linalg import svd_truncated
from dirmerge.methods import AlignmentTerms
from dirmerge.planning import Plan, TensorPlan

# What a byte of output costs against a floating-point operation, for the progress bar.
FLOPS_PER_BYTE = 50.0

Update = Tensor | LowRank


def run(
    plan: Plan,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    compute: Compute | None = None,
) -> MergeResult:
    """Runs a plan: W = W_0 + λ D for every merged tensor, and the plan's rule for every other.

    Args:
        plan: from make_plan; its inputs are closed at the end.
        out: the folder to write, which appears complete or not at all; None to return a state dict.
        overwrite: whether an existing folder may be replaced; only one that dirmerge wrote and that holds no
            input, no recipe and not the working directory is.
        progress: called after every tensor, in the plan's order.
        compute: where it runs; by default on the GPUs that are visible, else on the CPU.

    Returns:
        The result, with a record of every tensor.

    Raises:
        OutputError: the folder exists or cannot be written.
        NonFiniteError: NaN or Inf in an input or in the result, with file and tensor.
        MismatchError: tensors that must be equal are not.
        CheckpointError: a file that cannot be read any more.
        RecipeError: no λ reaches the alignment asked for, or the memory allowed is too small.

    Accuracy:
        float32 (float64 where an input is), one rounding to the output's dtype, to nearest even.
    """
    started = time.perf_counter()
    if out is None and plan.output == "adapter":
        raise ValueError("out must name a folder: an adapter is a folder of two files")
    with ExitStack() as stack:
        stack.callback(plan.close)
        compute = Compute.resolve() if compute is None else compute
        folder = None
        if out is not None:
            folder = stack.enter_context(OutputFolder(Path(out), overwrite, plan.protected))
            if plan.output == "model":
                _copy_side_files(plan, folder.path)
            scratch = folder.path
        else:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirmerge-")))
        stack.enter_context(compute.scoped_threads())
        sink = open_sink(plan, folder.path if folder is not None else None)
        merge = _Merge(plan, sink, scratch, compute, progress)
        with sink:
            merge.run()
        result = MergeResult(
            method=plan.method_name,
            path=None if out is None else Path(out),
            state_dict=sink.state_dict if isinstance(sink, MemorySink) else None,
            scale=merge.common_scale,
            scale_origin=merge.scale_origin,
            alignment=merge.alignment,
            records=merge.records,
            notes=list(plan.notes),
            hashes=merge.files.digests(),
            compute=compute.to_dict(),
            read_bytes=sum(merge.files.read_bytes.values()),
            seconds=0.0,
            peak_rss=_peak_rss(),
        )
        if folder is not None:
            result.seconds = time.perf_counter() - started
            write_documents(folder.path, plan, result.to_dict())
            folder.commit()
        result.seconds = time.perf_counter() - started
        return result


class _Merge:
    """One run over a plan's tensors."""

    def __init__(
        self, plan: Plan, sink: Sink, scratch: Path, compute: Compute, progress: ProgressCallback | None
    ) -> None:
        self.plan = plan
        self.sink = sink
        self.files = InputFiles(plan)
        self.reader = DeltaReader(plan.open(), self.files.read_again)
        self.budget = Budget.of_plan(compute, plan)
        self.jobs = ItemJobs(self.reader, self.files, self.budget.ahead)
        self.workers = Workers(compute.workers, self.budget.ahead, self.budget.behind)
        self.workers.on_stop(self.files.stop)
        self.waiting = WaitingUpdates(scratch, self.budget.waiting_on(compute.devices))
        self.lanes: list[Lane] = []
        self.records: list[TensorRecord] = []
        self.common_scale: float | None = None
        self.scale_origin = plan.scale.origin
        self.alignment: float | None = None
        self._devices = compute.devices
        self._progress = progress
        # With one λ for the model, a first pass merges what λ follows from, and does all that needs no λ.
        self._two_passes = plan.scale.alignment is not None and plan.scale.per == "model"
        self._first = [t for t in plan.tensors if self._two_passes and (t.rule != "merge" or t.aligned)]
        self._last = [t for t in plan.tensors if not self._two_passes or t.rule == "merge"]
        self._total = len(self._first) + len(self._last)
        self._work_total = sum(_work(tensor) for tensor in [*self._first, *self._last])
        self._done = 0
        self._work = 0.0
        self._written = 0
        self._output_bytes = sum(plan.bytes_of(tensor) for tensor in plan.written)

    def run(self) -> None:
        """Merges all tensors; with one λ for the model, first those from which λ follows."""
        check_inputs(self.plan, self.reader, self.sink)
        records = {t.name: TensorRecord(t.name, t.rule, t.why) for t in self.plan.tensors}
        with self.workers, self.waiting, ExitStack() as stack:
            for device in self._devices:
                self.lanes.append(self._lane(device))
                stack.callback(self.lanes[-1].close)
            scale = self._find_scale(records) if self._two_passes else None
            self._pass(self._last, scale, lambda item: self._write(item, records[item.tensor.name], scale))
            # Reads that nobody asked for may still have to be claimed, and take their turn before the rest.
            self.workers.drain()
            for rest in self.files.rest():
                self.workers.submit(Job(rest, 0))
            self.workers.drain()
        for tensor in self.plan.tensors:
            record = records[tensor.name]
            record.notes = [*tensor.notes, *record.notes]
            record.seconds = round(record.seconds, 6)
            self.records.append(record)
        scales = {record.scale for record in self.records if record.scale is not None}
        self.common_scale = scales.pop() if len(scales) == 1 else None

    def _lane(self, device: torch.device) -> Lane:
        if device.type == "cpu":
            return HostLane(self.reader, self.workers, self.jobs, self.sink)
        ahead = self.budget.device_ahead
        return DeviceLane(device, self.reader, self.workers, self.jobs, self.sink, ahead)

    def _find_scale(self, records: dict[str, TensorRecord]) -> float:
        """Merges the aligned tensors and lets them wait; returns λ = target / a(D)."""
        terms: dict[str, AlignmentTerms] = {}

        def perform(item: Item) -> None:
            name = item.tensor.name
            if item.tensor.rule == "merge":
                terms[name] = self._merge_aside(item, records[name])
            else:
                self._write(item, records[name], None)

        self._pass(self._first, None, perform)
        # The order of the sum decides its last bits: it is the plan's, whoever was first.
        total = AlignmentTerms.total(terms[t.name] for t in self._first if t.name in terms)
        scale = self._scale_for(total, "alignment")
        if total.value is not None:
            self.alignment = scale * total.value
        else:
            self.scale_origin += "; no matrix changes, so λ has no effect"
        return scale

    def _pass(self, tensors: list[TensorPlan], scale: float | None, perform: Callable[[Item], None]) -> None:
        """Performs some tensors, each on the lane with the least work before it; tells of them in order."""
        loads = [0.0] * len(self.lanes)
        items: list[Item | None] = []
        for tensor in tensors:
            held = [i for i, lane in enumerate(self.lanes) if self.waiting.device_of(tensor) == lane.device]
            chosen = held[0] if held else loads.index(min(loads))
            loads[chosen] += _work(tensor)
            items.append(self._item(tensor, self.lanes[chosen], scale))
        self.workers.feed(_jobs(deque(item for item in items if item)))
        for lane in self.lanes:
            lane.begin([item for item in items if item and item.lane is lane])
        phases = ["merge" if tensors is self._first and t.rule == "merge" else "write" for t in tensors]
        ended = [threading.Event() for _ in items]
        threads: list[threading.Thread] = []
        try:
            if len(self.lanes) > 1:
                for lane in self.lanes:
                    numbers = [i for i, item in enumerate(items) if item and item.lane is lane]
                    arguments = (lane, items, numbers, ended, perform)
                    name = f"dirmerge-lane-{len(threads)}"
                    threads.append(threading.Thread(target=self._run, args=arguments, name=name))
                    threads[-1].start()
            for i, (tensor, phase) in enumerate(zip(tensors, phases, strict=True)):
                if not threads:
                    self._run(self.lanes[0], items, [i], ended, perform)
                ended[i].wait()
                self.workers.check()
                if tensor.written and phase == "write":
                    self._written += self.plan.bytes_of(tensor)
                self._step(phase, tensor)
        except BaseException as error:
            self.workers.fail(error)  # the other lanes must not go on
            raise
        finally:
            for thread in threads:
                if thread.is_alive():
                    thread.join()

    def _run(
        self,
        lane: Lane,
        items: list[Item | None],
        numbers: list[int],
        ended: list[threading.Event],
        perform: Callable[[Item], None],
    ) -> None:
        """Performs the items of a lane; an error stops all, and those that wait."""
        try:
            with on_device(lane.device):
                for i in numbers:
                    item, items[i] = items[i], None  # what it holds goes with it
                    assert item is not None  # each is performed once
                    perform(item)
                    ended[i].set()
        except BaseException as error:
            self.workers.fail(error)
            for event in ended:
                event.set()
            if len(self.lanes) == 1:
                raise  # in the caller's thread

    def _item(self, tensor: TensorPlan, lane: Lane, scale: float | None) -> Item:
        """Returns what is to do for a tensor; `scale` is the λ of the model, once it is known."""
        if not tensor.written or (tensor.module is not None and tensor.name in self.waiting):
            return Item(tensor, lane)
        if tensor.module is not None and tensor.rule != "merge":
            return self.jobs.module(tensor, lane)
        known = tensor.scale if scale is None else scale
        work = matrices(self.plan, tensor, align=known is None) if tensor.rule == "merge" else []
        rule: RowRule | None
        if any(matrix.name in self.waiting for matrix in work):
            assert known is not None  # what waits, waits for it
            rule = self._waiting_rows(tensor, lane, work, known)
        else:
            rule = row_rule(self.plan, self.reader, tensor, known)
        if rule is not None:
            rule.chunk_bytes, rule.whole_bytes = lane.chunk_bytes, lane.whole_bytes
            return self.jobs.rows(tensor, lane, rule)
        base = self.plan.output == "model" and known is not None
        return self.jobs.matrices(tensor, lane, work, base=base)

    def _write(self, item: Item, record: TensorRecord, scale: float | None) -> None:
        """Sees to it that a tensor is made and written."""
        tensor, lane = item.tensor, item.lane
        if tensor.rule == "merge":
            record.scale = tensor.scale if tensor.scale is not None else scale
        if item.rule is not None:
            lane.make_rows(item)
            record.seconds += item.prepared.seconds + item.made.seconds
        elif tensor.module is not None and tensor.rule != "merge":
            self._write_module(lane, tensor, self._module_update(item), 1.0, record)
        elif tensor.module is not None and tensor.name in self.waiting:
            assert record.scale is not None  # what waits, waits for it
            self._write_module(lane, tensor, self._take(tensor.name, lane), record.scale, record)
        elif item.work and record.scale is None:
            terms = self._merge_aside(item, record)
            record.scale = self._scale_for(terms, f"alignment: {tensor.name}")
            if tensor.module is not None:
                self._write_module(lane, tensor, self._take(tensor.name, lane), record.scale, record)
            else:
                lane.write_rows(self._waiting_rows(tensor, lane, item.work, record.scale))
        else:
            for found, base in self._merged(item, base=self.plan.output == "model"):
                assert record.scale is not None  # not to be found, so it is known
                extend(record, found)
                if tensor.module is not None:
                    self._write_module(lane, tensor, found.merged.value, record.scale, record)
                else:
                    value = found.merged.value
                    updates = {found.work.index: lambda value=value: value}
                    lane.write_rows(UpdatedRows(self.reader, tensor, updates, record.scale, base))

    def _merged(self, item: Item, *, base: bool) -> Iterator[tuple[MergedMatrix, Tensor | None]]:
        """Merges the matrices of an item one by one; with each comes its base, where it is asked for."""
        tensor, lane = item.tensor, item.lane
        for work, jobs in zip(item.work, item.jobs, strict=True):
            method = self.plan.method
            again = method.looks_twice or (work.align and not method.leaves_factors)
            feed = self._open(lane, jobs, again=again)
            reader = DeltaReader(self.reader.inputs, feed.read)
            (found,) = merge_matrices([work], reader, lane.device)
            weights = None
            if base:
                weights = feed.fetch(self.reader, self.reader.base_read(tensor.name, *work.rows))
            feed.close()
            yield found, weights
            del found, weights

    def _merge_aside(self, item: Item, record: TensorRecord) -> AlignmentTerms:
        """Merges a tensor, lets its updates wait and returns the terms of its alignment."""
        terms = []
        for found, _ in self._merged(item, base=False):
            extend(record, found)
            terms.append(found.terms)
            self.waiting.put(found.work.name, smaller(found.merged))
        total = AlignmentTerms.total(terms)
        record.alignment = total.value
        return total

    def _scale_for(self, terms: AlignmentTerms, place: str) -> float:
        target = self.plan.scale.alignment
        assert target is not None  # a plan has either a scale or an alignment
        try:
            return terms.scale_for(target)
        except ValueError as error:
            raise RecipeError(f"{self.plan.origin}: {place}: {error}") from error

    def _take(self, name: str, lane: Lane) -> Update:
        update = self.waiting.get(name)
        return update if update.device == lane.device else update.to(lane.device)

    def _waiting_rows(
        self, tensor: TensorPlan, lane: Lane, work: list[MatrixWork], scale: float
    ) -> UpdatedRows:
        updates = {matrix.index: lambda name=matrix.name: self._take(name, lane) for matrix in work}
        return UpdatedRows(self.reader, tensor, updates, scale)

    def _open(self, lane: Lane, jobs: list[ReadJob], *, again: bool) -> Feed:
        """Returns the feed of a matrix; `again` is whether its deltas will be asked for twice."""
        room = self.budget.kept if lane.device.type == "cpu" else self.budget.device_kept
        keep = again and sum(job.nbytes for job in jobs) <= room
        return Feed(lane, jobs, self.files, self.reader.inputs.base, keep=keep)

    def _module_update(self, item: Item) -> LowRank:
        """Returns the update of an adapter's module that is taken from one adapter, or a mean."""
        feed = self._open(item.lane, item.jobs[0], again=False)
        reader = DeltaReader(self.reader.inputs, feed.read)
        device = item.lane.device
        sources = [source for source in item.tensor.sources if source.weight != 0]
        if item.tensor.rule == "take":
            update = reader.low_rank(sources[0], device)
        else:
            total = sum(source.weight for source in item.tensor.sources)
            parts = [reader.low_rank(s, device).scaled(s.weight / total) for s in sources]
            update = LowRank.sum(parts)
        feed.close()
        return update

    def _write_module(
        self, lane: Lane, tensor: TensorPlan, update: Update, scale: float, record: TensorRecord
    ) -> None:
        """Writes the update of an adapter's module, cut to the planned rank."""
        assert tensor.rank is not None  # _adapter_module of the planner
        if isinstance(update, Tensor):
            svd = svd_truncated(update, tensor.rank, "auto", seed=tensor.seed)
            update, kept = LowRank(svd.u * svd.s, None, svd.v), float(svd.energy)
        elif update.rank > tensor.rank:
            update, kept = update.truncate(tensor.rank)
        else:
            kept = 1.0
        if tensor.rule == "merge":
            record.rank = update.rank
            record.kept_energy = kept
        lane.write_module(tensor, update, scale)

    def _step(self, phase: str, tensor: TensorPlan) -> None:
        self._done += 1
        self._work += _work(tensor)
        if self._progress is not None:
            fraction = self._work / self._work_total if self._work_total else 1.0
            counts = (self._done, self._total, self._written, self._output_bytes)
            self._progress(Progress(phase, tensor.name, *counts, fraction))


def _jobs(items: deque[Item]) -> Iterator[Job]:
    """Yields the jobs of items and lets go of the items."""
    while items:
        item = items.popleft()
        yield from item.lane.jobs(item)


def extend(record: TensorRecord, found: MergedMatrix) -> None:
    """Adds one matrix's record to its tensor's."""
    own = found.merged.record
    low = found.merged.low_rank()
    if low is not None:
        record.rank = max(record.rank or 0, low.rank)
    energy = [float(value) for value in own.energy]
    if record.energy and len(record.energy) == len(energy):
        energy = [min(pair) for pair in zip(record.energy, energy, strict=True)]
    record.energy = energy
    repeated = ["merged again, with every decision read from the device"] if found.is_repeated else []
    for mine, theirs in ((record.fallbacks, own.fallbacks), (record.notes, [*own.notes, *repeated])):
        mine.extend(text for text in theirs if text not in mine)


def _work(tensor: TensorPlan) -> float:
    return tensor.flops + FLOPS_PER_BYTE * tensor.nbytes


def _copy_side_files(plan: Plan, folder: Path) -> None:
    """Copies the base's configuration and the tokenizer that the recipe asks for."""
    base = plan.open().base
    if base is not None and base.folder is not None:
        copy_side_files(base.folder, folder, dtype=plan.dtype)
    finish_tokenizer(plan, folder)


def _peak_rss() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
