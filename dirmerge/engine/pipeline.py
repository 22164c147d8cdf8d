"""Runs a plan: reads, merges and writes.

Memory: at any moment one tensor is in the making. Its base is held in the stored dtype while the deltas are
formed, the method decides how many deltas it keeps, and the result is added to the base and written in chunks
of rows. Nothing grows with the number of tensors: merged updates that wait for λ wait on disk (Spool).
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from dirmerge.checkpoints.spool import Spool
from dirmerge.checkpoints.writer import OutputFolder, copy_side_files, sha256_file
from dirmerge.engine.card import write_documents
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.result import MergeResult, Progress, ProgressCallback, TensorRecord
from dirmerge.engine.rules import RuleWriter
from dirmerge.engine.sinks import MemorySink, Sink, open_sink
from dirmerge.engine.tokenizer import finish_tokenizer
from dirmerge.engine.work import MergedMatrix, matrices, merge_matrices, smaller
from dirmerge.errors import RecipeError
from dirmerge.methods import AlignmentTerms
from dirmerge.planning import Plan, TensorPlan

# What a byte of output costs against a floating-point operation, for the progress bar.
FLOPS_PER_BYTE = 50.0

CPU = torch.device("cpu")


def run(
    plan: Plan,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeResult:
    """Run a plan: W = W_0 + λ D for every merged tensor, and the plan's rule for every other.

    Args:
        plan: from make_plan; its inputs are closed at the end.
        out: the folder to write, which appears complete or not at all; None to return a state dict.
        overwrite: whether an existing folder may be replaced; only one that dirmerge wrote and that holds no
            input, no recipe and not the working directory is.
        progress: called after every tensor.

    Returns:
        The result, with a record of every tensor.

    Raises:
        OutputError: the folder exists or cannot be written.
        NonFiniteError: NaN or Inf in an input or in the result, with file and tensor.
        MismatchError: tensors that must be equal are not.
        CheckpointError: a file that cannot be read any more.
        RecipeError: no λ reaches the alignment asked for.

    Accuracy:
        float32 (float64 where an input is), one rounding to the output's dtype, to nearest even.
    """
    started = time.perf_counter()
    if out is None and plan.output == "adapter":
        raise ValueError("out must name a folder: an adapter is a folder of two files")
    with ExitStack() as stack:
        stack.callback(plan.close)
        folder = None
        if out is not None:
            folder = stack.enter_context(OutputFolder(Path(out), overwrite, plan.protected))
            if plan.output == "model":
                _copy_side_files(plan, folder.path)
        hasher = stack.enter_context(_Hasher(plan))
        scratch = folder.path if folder is not None else None
        if scratch is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirmerge-")))
        sink = open_sink(plan, folder.path if folder is not None else None)
        merge = _Merge(plan, sink, progress)
        with sink, Spool(scratch) as spool:
            merge.run(spool)
        result = MergeResult(
            method=plan.method_name,
            path=None if out is None else Path(out),
            state_dict=sink.state_dict if isinstance(sink, MemorySink) else None,
            scale=merge.common_scale,
            scale_origin=merge.scale_origin,
            alignment=merge.alignment,
            records=merge.records,
            notes=list(plan.notes),
            hashes=hasher.result(),
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

    def __init__(self, plan: Plan, sink: Sink, progress: ProgressCallback | None) -> None:
        self.plan = plan
        self.reader = DeltaReader.of(plan)
        self.rules = RuleWriter(plan, self.reader, sink)
        self.records: list[TensorRecord] = []
        self.common_scale: float | None = None
        self.scale_origin = plan.scale.origin
        self.alignment: float | None = None
        self._progress = progress
        self._two_passes = plan.scale.alignment is not None and plan.scale.per == "model"
        first = [tensor for tensor in plan.tensors if tensor.aligned] if self._two_passes else []
        self._total = len(first) + len(plan.tensors)
        self._work_total = sum(_work(tensor) for tensor in [*first, *plan.tensors])
        self._done = 0
        self._work = 0.0
        self._written = 0
        self._output_bytes = sum(plan.bytes_of(tensor) for tensor in plan.written)

    def run(self, spool: Spool) -> None:
        """Merge all tensors; with one λ for the model, first find it, keeping the updates in the spool."""
        self.rules.check()
        merged: dict[str, TensorRecord] = {}
        scale: float | None = None
        if self._two_passes:
            scale, merged = self._find_scale(spool)
        for tensor in self.plan.tensors:
            begun = time.perf_counter()
            record = merged.pop(tensor.name, None) or TensorRecord(tensor.name, tensor.rule, tensor.why)
            record.notes = [*tensor.notes, *record.notes]
            if tensor.rule == "merge":
                self._write_merged(tensor, record, scale, spool)
            else:
                self.rules.write(tensor)
            if tensor.written:
                self._written += self.plan.bytes_of(tensor)
            record.seconds = round(record.seconds + time.perf_counter() - begun, 6)
            self.records.append(record)
            self._step("write", tensor)
        scales = {record.scale for record in self.records if record.scale is not None}
        self.common_scale = scales.pop() if len(scales) == 1 else None

    def _find_scale(self, spool: Spool) -> tuple[float, dict[str, TensorRecord]]:
        """Merge the aligned tensors into the spool and return λ = target / a(D), with their records."""
        terms: list[AlignmentTerms] = []
        records = {}
        for tensor in self.plan.tensors:
            if not tensor.aligned:
                continue
            begun = time.perf_counter()
            record = TensorRecord(tensor.name, tensor.rule, tensor.why)
            terms.append(self._spool(tensor, record, spool))
            record.seconds = time.perf_counter() - begun
            records[tensor.name] = record
            self._step("merge", tensor)
        total = AlignmentTerms.total(terms)
        scale = self._scale_for(total, "alignment")
        if total.value is not None:
            self.alignment = scale * total.value
        else:
            self.scale_origin += "; no matrix changes, so λ has no effect"
        return scale, records

    def _scale_for(self, terms: AlignmentTerms, place: str) -> float:
        target = self.plan.scale.alignment
        assert target is not None  # a plan has either a scale or an alignment
        try:
            return terms.scale_for(target)
        except ValueError as error:
            raise RecipeError(f"{self.plan.origin}: {place}: {error}") from error

    def _spool(self, tensor: TensorPlan, record: TensorRecord, spool: Spool) -> AlignmentTerms:
        """Merge a tensor into the spool and return the terms of its alignment."""
        terms = []
        for work in matrices(self.plan, tensor, align=True):
            (found,) = merge_matrices([work], self.reader, CPU)
            extend(record, found)
            terms.append(found.terms)
            spool.put(work.name, smaller(found.merged))
            del found
        total = AlignmentTerms.total(terms)
        record.alignment = total.value
        return total

    def _write_merged(
        self, tensor: TensorPlan, record: TensorRecord, scale: float | None, spool: Spool
    ) -> None:
        record.scale = tensor.scale if tensor.scale is not None else scale
        if record.scale is None:
            terms = self._spool(tensor, record, spool)
            record.scale = self._scale_for(terms, f"alignment: {tensor.name}")
        for work in matrices(self.plan, tensor):
            if work.name in spool:
                update = spool.get(work.name)
            else:
                (found,) = merge_matrices([work], self.reader, CPU)
                extend(record, found)
                update = found.merged.value
                del found
            if self.plan.output == "adapter":
                self.rules.write_module(tensor, update, record.scale, record)
            else:
                self.rules.add(tensor, work.index, update, record.scale)

    def _step(self, phase: str, tensor: TensorPlan) -> None:
        self._done += 1
        self._work += _work(tensor)
        if self._progress is not None:
            fraction = self._work / self._work_total if self._work_total else 1.0
            counts = (self._done, self._total, self._written, self._output_bytes)
            self._progress(Progress(phase, tensor.name, *counts, fraction))


class _Hasher:
    """Hashes the input files beside the merge, one chunk in memory."""

    def __init__(self, plan: Plan) -> None:
        self._files = list(dict.fromkeys(Path(file.path) for item in plan.inputs for file in item.files))
        self._hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dirmerge-sha256", daemon=True)

    def __enter__(self) -> _Hasher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error must not wait for the hash of a large file; the thread ends after that file.
        self._stop.set()

    def result(self) -> dict[str, str]:
        """Wait for the hashes, by path."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hashes

    def _work(self) -> None:
        try:
            for path in self._files:
                if self._stop.is_set():
                    return
                self._hashes[str(path)] = sha256_file(path)
        except Exception as error:  # raised again by result(), in the caller's thread
            self._error = error


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
