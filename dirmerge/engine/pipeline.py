"""Runs a plan: reads, merges and writes at the same time, in bounded memory.

Workers read ahead, hash what passes, make the tensors that need no matrix row by row, and write; the calling
thread merges matrices meanwhile, in the plan's order. What may wait between the stages is bounded in bytes.
Nothing grows with the number of tensors: merged updates that wait for λ wait on disk, or in memory where a
budget allows it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dirmerge.checkpoints.safetensors_io import TensorInfo, read_tensor
from dirmerge.checkpoints.writer import OutputFolder, copy_side_files
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.card import write_documents
from dirmerge.engine.compute import Budget, Compute
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.items import Feed, Item, Items, ReadJob
from dirmerge.engine.reading import InputFiles
from dirmerge.engine.result import MergeResult, Progress, ProgressCallback, TensorRecord
from dirmerge.engine.rules import Made, RowRule, Step, UpdatedRows, check_inputs, row_rule
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

CPU = torch.device("cpu")

Update = Tensor | LowRank


def run(
    plan: Plan,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    compute: Compute | None = None,
) -> MergeResult:
    """Run a plan: W = W_0 + λ D for every merged tensor, and the plan's rule for every other.

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
        self.reader = DeltaReader.of(plan)
        self.files = InputFiles(plan)
        self.items = Items(self.reader, self.files)
        self.budget = Budget.of_plan(compute, plan)
        self.workers = Workers(compute.workers, self.budget.ahead, self.budget.behind)
        self.workers.on_stop(self.files.stop)
        self.waiting = WaitingUpdates(scratch, self.budget.waiting)
        self.records: list[TensorRecord] = []
        self.common_scale: float | None = None
        self.scale_origin = plan.scale.origin
        self.alignment: float | None = None
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
        with self.workers, self.waiting:
            scale = self._find_scale(records) if self._two_passes else None
            for item in self._feed(self._last, scale):
                with _timed(records[item.tensor.name]) as record:
                    self._write(item, record, scale)
                self._step("write", item.tensor)
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

    def _find_scale(self, records: dict[str, TensorRecord]) -> float:
        """Merges the aligned tensors and lets them wait; returns λ = target / a(D)."""
        terms: list[AlignmentTerms] = []
        for item in self._feed(self._first, None):
            with _timed(records[item.tensor.name]) as record:
                if item.tensor.rule == "merge":
                    terms.append(self._merge_aside(item, record))
                else:
                    self._write(item, record, None)
            self._step("merge" if item.tensor.rule == "merge" else "write", item.tensor)
        total = AlignmentTerms.total(terms)
        scale = self._scale_for(total, "alignment")
        if total.value is not None:
            self.alignment = scale * total.value
        else:
            self.scale_origin += "; no matrix changes, so λ has no effect"
        return scale

    def _feed(self, tensors: list[TensorPlan], scale: float | None) -> Iterator[Item]:
        """Starts the workers on some tensors and yields the items in their order."""
        items = [self._item(tensor, scale) for tensor in tensors]
        self.workers.feed(self.items.host_jobs(list(items), self.workers, self._put))
        items.reverse()
        while items:
            yield items.pop()

    def _item(self, tensor: TensorPlan, scale: float | None) -> Item:
        """Returns what is to do for a tensor; `scale` is the λ of the model, once it is known."""
        if not tensor.written or (tensor.module is not None and tensor.name in self.waiting):
            return Item(tensor)
        if tensor.module is not None and tensor.rule != "merge":
            return self.items.module(tensor)
        known = tensor.scale if scale is None else scale
        work = matrices(self.plan, tensor, align=known is None) if tensor.rule == "merge" else []
        if any(matrix.name in self.waiting for matrix in work):
            assert known is not None  # what waits, waits for it
            return self.items.rows(tensor, self._waiting_rows(tensor, work, known))
        rule = row_rule(self.plan, self.reader, tensor, known)
        if rule is not None:
            return self.items.rows(tensor, rule)
        return self.items.matrices(tensor, work, base=self.plan.output == "model" and known is not None)

    def _write(self, item: Item, record: TensorRecord, scale: float | None) -> None:
        """Sees to it that a tensor is made and written."""
        tensor = item.tensor
        if tensor.rule == "merge":
            record.scale = tensor.scale if tensor.scale is not None else scale
        if item.rule is not None:
            self.workers.wait(item.made)
            record.seconds += item.prepared.seconds + item.made.seconds
            item.rule = None
        elif tensor.module is not None and tensor.rule != "merge":
            self._write_module(tensor, self._module_update(item), 1.0, record)
        elif tensor.module is not None and tensor.name in self.waiting:
            assert record.scale is not None  # what waits, waits for it
            self._write_module(tensor, self.waiting.get(tensor.name), record.scale, record)
        elif item.work and record.scale is None:
            terms = self._merge_aside(item, record)
            record.scale = self._scale_for(terms, f"alignment: {tensor.name}")
            if tensor.module is not None:
                self._write_module(tensor, self.waiting.get(tensor.name), record.scale, record)
            else:
                self._submit(self._waiting_rows(tensor, item.work, record.scale))
        else:
            for found, base in self._merged(item):
                assert record.scale is not None  # not to be found, so it is known
                extend(record, found)
                if tensor.module is not None:
                    self._write_module(tensor, found.merged.value, record.scale, record)
                else:
                    value, index = found.merged.value, found.work.index
                    updates = {index: lambda value=value: value}
                    self._submit(UpdatedRows(self.reader, tensor, updates, record.scale, base))
        if tensor.written:
            self._written += self.plan.bytes_of(tensor)

    def _merged(self, item: Item) -> Iterator[tuple[MergedMatrix, Tensor | None]]:
        """Merges the matrices of an item one by one; with each comes its base, where that was read."""
        tensor = item.tensor
        for work, jobs in zip(item.work, item.jobs, strict=True):
            feed = self._open(jobs)
            (found,) = merge_matrices([work], self._reader(feed), CPU)
            base = None
            if tensor.in_base and self.plan.output == "model":
                read = self.reader.base_read(tensor.name, *work.rows)
                base = feed.read(read.info, read.start, read.stop)
                base = self.reader.fetch(read) if base is None else base
            feed.close()
            jobs.clear()
            yield found, base
            del found, base

    def _merge_aside(self, item: Item, record: TensorRecord) -> AlignmentTerms:
        """Merges a tensor, lets its updates wait and returns the terms of its alignment."""
        terms = []
        for found, _ in self._merged(item):
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

    def _waiting_rows(self, tensor: TensorPlan, work: list[MatrixWork], scale: float) -> UpdatedRows:
        updates = {matrix.index: lambda name=matrix.name: self.waiting.get(name) for matrix in work}
        return UpdatedRows(self.reader, tensor, updates, scale)

    def _open(self, jobs: list[ReadJob]) -> Feed:
        size = sum(job.nbytes for job in jobs)
        return Feed(self.workers, jobs, keep=size <= self.budget.ahead)

    def _reader(self, feed: Feed) -> DeltaReader:
        """Returns a reader that takes what the workers have read, and reads itself what they have not."""

        def read(info: TensorInfo, start: int | None = None, stop: int | None = None) -> Tensor:
            value = feed.read(info, start, stop)
            return read_tensor(info, start, stop) if value is None else value

        return DeltaReader(self.reader.inputs, read)

    def _module_update(self, item: Item) -> LowRank:
        """Returns the update of an adapter's module that is taken from one adapter, or a mean."""
        (jobs,) = item.jobs
        feed = self._open(jobs)
        reader = self._reader(feed)
        sources = [source for source in item.tensor.sources if source.weight != 0]
        if item.tensor.rule == "take":
            update = reader.low_rank(sources[0])
        else:
            total = sum(source.weight for source in item.tensor.sources)
            update = LowRank.sum([reader.low_rank(s).scaled(s.weight / total) for s in sources])
        feed.close()
        return update

    def _write_module(self, tensor: TensorPlan, update: Update, scale: float, record: TensorRecord) -> None:
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
        final = update.scaled(scale)
        self.workers.submit(Job(lambda: self.sink.update(tensor, final), self.plan.bytes_of(tensor)))

    def _submit(self, rule: RowRule) -> None:
        """Lets the workers make and write rows of an update."""
        for step in rule.steps():

            def make(step: Step = step) -> None:
                made = step.make([self.reader.fetch(read) for read in step.reads])
                assert made is not None  # a step of rows
                self._put(rule, step, made)

            self.workers.submit(Job(make, step.nbytes))

    def _put(self, rule: RowRule, step: Step, made: Made) -> None:
        assert step.rows is not None  # a step of rows
        if int(made.nonfinite):
            raise rule.blame(*step.rows)
        self.sink.write(rule.tensor, made.value, step.rows[0])

    def _step(self, phase: str, tensor: TensorPlan) -> None:
        self._done += 1
        self._work += _work(tensor)
        if self._progress is not None:
            fraction = self._work / self._work_total if self._work_total else 1.0
            counts = (self._done, self._total, self._written, self._output_bytes)
            self._progress(Progress(phase, tensor.name, *counts, fraction))


@contextmanager
def _timed(record: TensorRecord) -> Iterator[TensorRecord]:
    """Adds the time that passes to a record."""
    begun = time.perf_counter()
    yield record
    record.seconds += time.perf_counter() - begun


def extend(record: TensorRecord, found: MergedMatrix) -> None:
    """Add one matrix's record to its tensor's."""
    own = found.merged.record
    low = found.merged.low_rank()
    if low is not None:
        record.rank = max(record.rank or 0, low.rank)
    energy = [float(value) for value in own.energy]
    if record.energy and len(record.energy) == len(energy):
        energy = [min(pair) for pair in zip(record.energy, energy, strict=True)]
    record.energy = energy
    for mine, theirs in ((record.fallbacks, own.fallbacks), (record.notes, own.notes)):
        mine.extend(text for text in theirs if text not in mine)


def _work(tensor: TensorPlan) -> float:
    return tensor.flops + FLOPS_PER_BYTE * tensor.nbytes


def _copy_side_files(plan: Plan, folder: Path) -> None:
    """Copy the base's configuration and the tokenizer that the recipe asks for."""
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
