"""The engine of one process: reads, merges and writes one tensor at a time.

Memory: at any moment one tensor is in the making. Its base is held in the stored dtype while the deltas are
formed, the method decides how many deltas it keeps, and the result is added to the base and written in chunks
of rows. Nothing grows with the number of tensors: merged updates that wait for λ wait on disk (Spool).
"""

from __future__ import annotations

import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.checkpoints.adapters import AdapterModule, AdapterWriter
from dirmerge.checkpoints.card import write_documents
from dirmerge.checkpoints.plan import Input, Plan, Source, TensorPlan
from dirmerge.checkpoints.safetensors_io import TensorInfo, read_tensor
from dirmerge.checkpoints.tokenizer import finish_tokenizer
from dirmerge.checkpoints.writer import OutputFolder, ShardedWriter, Spool, copy_side_files, sha256_file
from dirmerge.difference import Difference
from dirmerge.engine.result import MergeResult, Progress, ProgressCallback, TensorRecord
from dirmerge.errors import MismatchError, NonFiniteError, RecipeError
from dirmerge.linalg import seed_for, svd_truncated
from dirmerge.lowrank import LowRank
from dirmerge.methods import MergedDelta, Tasks, merge_tasks
from dirmerge.scale import alignment_terms, scale_for

# Rows are read, added and written in chunks of about this size in float32.
CHUNK_BYTES = 64 << 20

# What a byte of output costs against a floating-point operation, for the progress bar.
FLOPS_PER_BYTE = 50.0

Update = Tensor | LowRank
Rows = tuple[int | None, int | None]


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
        folder = (
            None if out is None else (stack.enter_context(OutputFolder(Path(out), overwrite, plan.protected)))
        )
        if folder is not None and plan.output == "model":
            _copy_side_files(plan, folder.path)
        hasher = stack.enter_context(_Hasher(plan))
        scratch = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirmerge-")))
            if folder is None
            else folder.path
        )
        sink: _Sink
        if folder is None:
            sink = _MemorySink(plan)
        elif plan.output == "adapter":
            sink = _AdapterSink(plan, folder.path)
        else:
            sink = _ModelSink(plan, folder.path)
        merge = _Merge(plan, sink, progress)
        with sink, Spool(scratch) as spool:
            merge.run(spool)
        result = MergeResult(
            method=plan.method.name,
            path=None if out is None else Path(out),
            state_dict=sink.state_dict if isinstance(sink, _MemorySink) else None,
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

    def __init__(self, plan: Plan, sink: _Sink, progress: ProgressCallback | None) -> None:
        self.plan = plan
        self.sink = sink
        self.read = Inputs(plan)
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
        self._check_base_copies()
        for tensor in self.plan.tensors:
            if tensor.rule == "tied":
                self._check_tied(tensor)
        merged: dict[str, TensorRecord] = {}
        scale: float | None = None
        if self._two_passes:
            scale, merged = self._find_scale(spool)
        for tensor in self.plan.tensors:
            begun = time.perf_counter()
            record = merged.pop(tensor.name, None) or TensorRecord(tensor.name, tensor.rule, tensor.why)
            record.notes = [*tensor.notes, *record.notes]
            self._write(tensor, record, scale, spool)
            record.seconds = round(record.seconds + time.perf_counter() - begun, 6)
            self.records.append(record)
            self._step("write", tensor)
        scales = {record.scale for record in self.records if record.scale is not None}
        self.common_scale = scales.pop() if len(scales) == 1 else None

    def _find_scale(self, spool: Spool) -> tuple[float, dict[str, TensorRecord]]:
        """Merge the aligned tensors into the spool and return λ = target / a(D), with their records."""
        numerator = denominator = 0.0
        records = {}
        for tensor in self.plan.tensors:
            if not tensor.aligned:
                continue
            begun = time.perf_counter()
            record = TensorRecord(tensor.name, tensor.rule, tensor.why)
            terms = self._spool(tensor, record, spool)
            numerator += terms[0]
            denominator += terms[1]
            record.seconds = time.perf_counter() - begun
            records[tensor.name] = record
            self._step("merge", tensor)
        target = self.plan.scale.alignment
        assert target is not None  # _two_passes
        try:
            scale = scale_for(numerator, denominator, target)
        except ValueError as error:
            raise RecipeError(f"{self.plan.recipe.origin}: alignment: {error}") from error
        if denominator > 0:
            self.alignment = scale * numerator / denominator
        else:
            self.scale_origin += "; no matrix changes, so λ has no effect"
        return scale, records

    def _spool(self, tensor: TensorPlan, record: TensorRecord, spool: Spool) -> tuple[float, float]:
        """Merge a tensor into the spool and return its alignment's numerator and denominator."""
        numerator = denominator = 0.0
        for index in slices(tensor):
            merged, terms = self._merged(tensor, index, record, align=True)
            numerator += terms[0]
            denominator += terms[1]
            spool.put(matrix_name(tensor, index), _smaller(merged))
            del merged
        if denominator > 0:
            record.alignment = numerator / denominator
        return numerator, denominator

    def _own_scale(self, tensor: TensorPlan, record: TensorRecord, spool: Spool) -> float:
        """Return λ of one parameter, from its own alignment; its update is in the spool then."""
        terms = self._spool(tensor, record, spool)
        target = self.plan.scale.alignment
        assert target is not None  # a plan has either a scale or an alignment
        try:
            return scale_for(*terms, target)
        except ValueError as error:
            raise RecipeError(f"{self.plan.recipe.origin}: alignment: {tensor.name}: {error}") from error

    def _merged(
        self, tensor: TensorPlan, index: int | None, record: TensorRecord, *, align: bool
    ) -> tuple[MergedDelta, tuple[float, float]]:
        """Merge one matrix by the method; with its alignment's numerator and denominator if asked for."""
        tasks, weights = self.read.tasks(tensor, index)
        seed = matrix_seed(tensor, index, self.plan.recipe.seed)
        merged = merge_tasks(tasks, self.plan.method.name, weights, tensor.options, seed)
        terms = alignment_terms(tasks, merged, seed) if align else (0.0, 0.0)
        merged.factors = None  # the alignment is all they are still needed for
        _extend(record, merged)
        return merged, terms

    def _write(self, tensor: TensorPlan, record: TensorRecord, scale: float | None, spool: Spool) -> None:
        match tensor.rule:
            case "merge":
                self._write_merged(tensor, record, scale, spool)
            case "mean" | "common_rows":
                self._write_mean(tensor)
            case "base":
                for start, stop in _chunks(tensor.shape):
                    value = self.read.base(tensor.name, start, stop, check=False)
                    self.sink.write(tensor, value.to(tensor.dtype), start)
            case "take":
                self._write_taken(tensor)
            case "identical":
                self._write_identical(tensor)
            case "tied" | "drop":
                pass
        if tensor.written:
            self._written += self.plan.bytes_of(tensor)

    def _write_merged(
        self, tensor: TensorPlan, record: TensorRecord, scale: float | None, spool: Spool
    ) -> None:
        record.scale = tensor.scale if tensor.scale is not None else scale
        if record.scale is None:
            record.scale = self._own_scale(tensor, record, spool)
        for index in slices(tensor):
            key = matrix_name(tensor, index)
            if key in spool:
                update = spool.get(key)
            else:
                update = self._merged(tensor, index, record, align=False)[0].value
            if self.plan.output == "adapter":
                self._write_module(tensor, update, record.scale, record)
            else:
                self._add(tensor, index, update, record.scale)

    def _add(self, tensor: TensorPlan, index: int | None, update: Update, scale: float) -> None:
        """Write W_0 + λ D: a chunk of rows at a time, a stack matrix by matrix."""
        shape = tensor.shape if index is None else (1, *tensor.shape[1:])
        factors = dense = None
        if isinstance(update, LowRank):
            factors = update.folded()
        else:
            dense = update.reshape(shape)
        for start, stop in _chunks(tensor.shape) if index is None else [(index, index + 1)]:
            base = self.read.base(tensor.name, start, stop)
            if factors is not None:
                rows = slice(start, stop) if index is None else slice(None)
                value = ops.lowrank_add(
                    base if index is None else base[0],
                    factors[0][rows],
                    factors[1],
                    scale=scale,
                    out_dtype=tensor.dtype,
                )
                value = value if index is None else value[None]
            else:
                assert dense is not None  # one of the two forms
                part = dense[start:stop] if index is None and start is not None else dense
                value = torch.add(base.to(part.dtype), part, alpha=scale).to(tensor.dtype)
            self._put(tensor, value, start)

    def _write_mean(self, tensor: TensorPlan) -> None:
        if self.plan.output == "adapter" and tensor.module is not None:
            total = sum(source.weight for source in tensor.sources)
            parts = [
                self.read.low_rank(source).scaled(source.weight / total)
                for source in tensor.sources
                if source.weight != 0
            ]
            self._write_module(tensor, LowRank.sum(parts), 1.0, None)
            return
        total = sum(source.weight for source in tensor.sources)
        updates = self.read.low_ranks(tensor)
        common = tensor.rows
        for start, stop in _chunks(tensor.shape, common):
            base = self.read.base(tensor.name, start, stop) if tensor.in_base else None
            if common is not None and start is not None and start >= common:
                assert base is not None  # only common_rows has rows beyond the common ones
                self._put(tensor, base.to(tensor.dtype), start)
                continue
            mean: Tensor | None = None
            for source in tensor.sources:
                if source.weight == 0:
                    continue
                part = self.read.delta(tensor, source, base, start, stop, updates.get(source.task))
                part = part.mul_(source.weight / total)
                mean = (
                    part if mean is None else mean.to(torch.promote_types(mean.dtype, part.dtype)).add_(part)
                )
                del part
            assert mean is not None  # the plan refuses weights that sum to 0
            value = mean if base is None else base.to(mean.dtype).add_(mean)
            self._put(tensor, value.to(tensor.dtype), start)

    def _write_taken(self, tensor: TensorPlan) -> None:
        source = tensor.sources[0]
        if self.plan.output == "adapter" and tensor.module is not None:
            self._write_module(tensor, self.read.low_rank(source), 1.0, None)
            return
        update = self.read.low_ranks(tensor).get(source.task)
        for start, stop in _chunks(tensor.shape):
            value = self.read.value(tensor, source, start, stop)
            if value is None:
                value = self.read.base(tensor.name, start, stop)
            if update is not None:
                value = value.to(update.dtype) + _row_range(update, start, stop).dense()
            self._put(tensor, value.to(tensor.dtype), start)

    def _write_identical(self, tensor: TensorPlan) -> None:
        for start, stop in _chunks(tensor.shape):
            first: Tensor | None = None
            where = "the base"
            if tensor.in_base:
                first = self.read.base(tensor.name, start, stop)
            for source in tensor.sources:
                value = self.read.value(tensor, source, start, stop)
                label = self.plan.tasks[source.task].label
                if first is None:
                    first, where = value, label
                elif value is not None and not torch.equal(first, value):
                    raise MismatchError(
                        f"{tensor.name}: integers differ between {where} and {label}; choose one with "
                        f'`- {{match: "{tensor.name}", rule: base}}` under `tensors:`'
                    )
            assert first is not None  # a tensor is somewhere
            self.sink.write(tensor, first.to(tensor.dtype), start)

    def _check_tied(self, tensor: TensorPlan) -> None:
        """Check that a tied tensor equals the one written in its place, in every input that has both."""
        assert tensor.tied_to is not None
        inputs = [self.plan.base] if tensor.in_base else []
        inputs += [self.plan.tasks[source.task] for source in tensor.sources]
        for item in inputs:
            if item is None or item.checkpoint is None:
                continue
            one, other = item.tensors[tensor.name], item.tensors[tensor.tied_to]
            shape = item.checkpoint.tensors[one].shape
            same = shape == item.checkpoint.tensors[other].shape
            for start, stop in _chunks(shape):
                same = same and torch.equal(
                    item.checkpoint.read(one, start, stop), item.checkpoint.read(other, start, stop)
                )
            if not same:
                raise MismatchError(
                    f"{item.label}: {one} is declared to be tied to {other} and differs from it; set "
                    "tie_word_embeddings to false in its config.json, or treat it as a tensor of its own: "
                    f'`- {{match: "{tensor.name}", rule: mean}}` under `tensors:`'
                )
        if isinstance(self.sink, _MemorySink):
            self.sink.tie(tensor.name, tensor.tied_to)

    def _write_module(
        self, tensor: TensorPlan, update: Update, scale: float, record: TensorRecord | None
    ) -> None:
        """Write the update of an adapter's module, cut to the planned rank."""
        assert tensor.rank is not None  # _adapter_module of the planner
        if isinstance(update, Tensor):
            svd = svd_truncated(update, tensor.rank, "auto", seed=tensor.seed)
            update, kept = LowRank(svd.u * svd.s, None, svd.v), float(svd.energy)
        elif update.rank > tensor.rank:
            update, kept = update.truncate(tensor.rank)
        else:
            kept = 1.0
        if record is not None:
            record.rank = update.rank
            record.kept_energy = kept
        self.sink.update(tensor, update.scaled(scale))

    def _put(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"{tensor.name}: the merged tensor is not finite in "
                f"{str(value.dtype).removeprefix('torch.')}; choose a wider out_dtype or a smaller scale"
            )
        self.sink.write(tensor, value, start)

    def _check_base_copies(self) -> None:
        base = self.plan.base.checkpoint if self.plan.base is not None else None
        for task in self.plan.tasks:
            if base is not None and task.adapter is not None:
                task.adapter.check_base_copies(base)

    def _step(self, phase: str, tensor: TensorPlan) -> None:
        self._done += 1
        self._work += _work(tensor)
        if self._progress is not None:
            fraction = self._work / self._work_total if self._work_total else 1.0
            counts = (self._done, self._total, self._written, self._output_bytes)
            self._progress(Progress(phase, tensor.name, *counts, fraction))


class Inputs:
    """Reads weights and deltas; NaN and Inf are errors that name the file they come from."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def base(self, name: str, start: int | None, stop: int | None, *, check: bool = True) -> Tensor:
        """Return rows of the base's tensor in its stored dtype."""
        base = self.plan.base
        assert base is not None  # a rule that reads the base is planned only where there is one
        assert base.checkpoint is not None
        value = base.checkpoint.read(base.tensors[name], start, stop)
        if check:
            _check_finite(value, base.checkpoint.tensors[base.tensors[name]], base)
        return value

    def matrix_shape(self, tensor: TensorPlan) -> tuple[int, int]:
        """Return the shape of the matrix that the method sees."""
        if tensor.slices is not None:
            return tensor.shape[1], tensor.shape[2]
        if len(tensor.shape) < 2:
            return 1, tensor.numel
        return tensor.shape[0], math.prod(tensor.shape[1:])

    def base_matrix(self, tensor: TensorPlan, index: int | None) -> Tensor | None:
        """Return W_0 for the dense deltas, None when there is none to take a difference from."""
        if all(source.rank is not None for source in tensor.sources):
            return None
        rows = (None, None) if index is None else (index, index + 1)
        base = self.base(tensor.name, *rows, check=False)
        return base.reshape(self.matrix_shape(tensor))

    def tasks(self, tensor: TensorPlan, index: int | None) -> tuple[Tasks, list[float]]:
        """Return the deltas of one matrix as the method sees them, loaded one at a time, and their weights.

        A weight of 0 leaves its fine-tune out.
        """
        sources = [source for source in tensor.sources if source.weight != 0]
        base = self.base_matrix(tensor, index)
        tasks = Tasks(
            self.matrix_shape(tensor),
            [_Loader(self, tensor, source, index, base) for source in sources],
            [source.rank for source in sources],
            [self.plan.tasks[source.task].label for source in sources],
        )
        return tasks, [source.weight for source in sources]

    def low_rank(self, source: Source) -> LowRank:
        """Return the update of an adapter's module."""
        adapter = self.plan.tasks[source.task].adapter
        assert adapter is not None  # only adapters' sources have a module
        assert source.module is not None
        return adapter.targets[source.module].read()

    def low_ranks(self, tensor: TensorPlan) -> dict[int, LowRank]:
        """Return the updates of all adapters that change a tensor."""
        return {s.task: self.low_rank(s) for s in tensor.sources if s.module is not None and s.saved is None}

    def value(self, tensor: TensorPlan, source: Source, start: int | None, stop: int | None) -> Tensor | None:
        """Return rows of the fine-tune's own full tensor, None when it has only an update."""
        task = self.plan.tasks[source.task]
        if source.saved is not None and task.adapter is not None:
            info = task.adapter.saved[source.saved]
            return _check_finite(read_tensor(info, start, stop), info, task)
        if source.tensor is not None and task.checkpoint is not None:
            value = task.checkpoint.read(source.tensor, start, stop)
            return _check_finite(value, task.checkpoint.tensors[source.tensor], task)
        return None

    def delta(
        self,
        tensor: TensorPlan,
        source: Source,
        base: Tensor | None,
        start: int | None,
        stop: int | None,
        update: LowRank | None,
    ) -> Tensor:
        """Return rows of W_t − W_0 (W_t itself without a base), in memory of its own."""
        value = self.value(tensor, source, start, stop)
        part: Tensor | None = None
        if value is not None and base is not None:
            part = ops.delta(value, base).value
        elif value is not None:
            part = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        if update is not None:
            low = _row_range(update, start, stop).dense()
            part = low if part is None else part.to(torch.promote_types(part.dtype, low.dtype)).add_(low)
        if part is None:
            assert base is not None  # unchanged by an adapter: the plan knows the base has it
            part = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32))
        return part


class _Loader:
    """Loads one task's delta, from disk every time: what the method does not keep is not in memory."""

    def __init__(
        self, inputs: Inputs, tensor: TensorPlan, source: Source, index: int | None, base: Tensor | None
    ) -> None:
        self.inputs = inputs
        self.tensor = tensor
        self.source = source
        self.index = index
        self.base = base

    def __call__(self) -> LowRank | Tensor | Difference:
        source, base = self.source, self.base
        if source.rank is not None:
            return self.inputs.low_rank(source)
        assert base is not None  # base_matrix: dense deltas need it
        task = self.inputs.plan.tasks[source.task]
        rows: Rows = (None, None) if self.index is None else (self.index, self.index + 1)
        difference: Tensor | Difference
        if source.saved is not None and task.adapter is not None:
            info = task.adapter.saved[source.saved]
            difference = self._difference(read_tensor(info, *rows), info, task, base)
        elif source.tensor is not None and task.checkpoint is not None:
            info = task.checkpoint.tensors[source.tensor]
            difference = self._difference(task.checkpoint.read(source.tensor, *rows), info, task, base)
        else:
            difference = torch.zeros(base.shape, dtype=torch.promote_types(base.dtype, torch.float32))
        if source.module is not None:
            update = self.inputs.low_rank(source)
            left, right = update.folded()
            if isinstance(difference, Difference):
                difference = difference.dense()
            dtype = torch.promote_types(difference.dtype, update.dtype)
            difference = difference.to(dtype).addmm_(left.to(dtype), right.to(dtype).mT)
        return difference

    def _difference(self, value: Tensor, info: TensorInfo, task: Input, base: Tensor) -> Difference:
        # A difference of finite weights is not finite only where both are near the end of float32.
        bound = _largest(value) + _largest(base)
        if not bound <= torch.finfo(torch.float32).max:
            _check_finite(value, info, task)
            self.inputs.base(self.tensor.name, None, None)
            if not bool(torch.isfinite(ops.delta(value.reshape(base.shape), base).value).all()):
                raise NonFiniteError(
                    f"{_place(info, task)}: tensor {info.name!r} minus the base's is not finite: its values "
                    "are too large"
                )
        return Difference(value.reshape(base.shape), base)


class _Sink(Protocol):
    """Where merged tensors go; leaving it checks that all of them have come."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        """Take a tensor, or its rows from `start` on."""

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        """Take the update of an adapter's module."""


class _MemorySink:
    """A state dict."""

    def __init__(self, plan: Plan) -> None:
        self.state_dict: dict[str, Tensor] = {}
        self._ties: dict[str, str] = {}
        self._order = [tensor.name for tensor in plan.tensors]

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        if start is None:
            self.state_dict[tensor.name] = value.reshape(tensor.shape)
            return
        if tensor.name not in self.state_dict:
            self.state_dict[tensor.name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.state_dict[tensor.name][start : start + value.shape[0]] = value

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        raise TypeError("an adapter cannot be written to a state dict")

    def tie(self, name: str, other: str) -> None:
        self._ties[name] = other

    def __enter__(self) -> _MemorySink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        for name, other in self._ties.items():
            self.state_dict[name] = self.state_dict[other]
        self.state_dict = {name: self.state_dict[name] for name in self._order if name in self.state_dict}


class _ModelSink:
    """Shards in the Hugging Face layout."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.written]
        self._writer = ShardedWriter(folder, entries, plan.recipe.shard_size)

    def __enter__(self) -> _ModelSink:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        self._writer.write(tensor.name, value, start)

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        raise TypeError("a model takes tensors, not updates")


class _AdapterSink:
    """A PEFT adapter."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        modules = []
        for tensor in plan.written:
            if tensor.module is not None:
                assert tensor.rank is not None
                kind = next(
                    task.adapter.targets[tensor.module].kind
                    for task in plan.tasks
                    if task.adapter is not None and tensor.module in task.adapter.targets
                )
                shape = (tensor.shape[0], tensor.shape[1])
                modules.append(AdapterModule(tensor.module, shape, tensor.rank, kind))
        full = [(t.name, t.dtype, t.shape) for t in plan.written if t.module is None]
        configs = [task.adapter.config for task in plan.tasks if task.adapter is not None]
        task_types = {config.get("task_type") for config in configs}
        dtypes = [tensor.dtype for tensor in plan.written if tensor.module is not None]
        self._writer = AdapterWriter(
            folder,
            modules,
            base_name=_base_name(plan),
            full=full,
            dtype=dtypes[0] if dtypes else torch.float32,
            task_type=task_types.pop() if len(task_types) == 1 else None,
        )

    def __enter__(self) -> _AdapterSink:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        self._writer.write_full(tensor.name, value, start)

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        assert tensor.module is not None
        self._writer.write(tensor.module, update)


class _Hasher:
    """Hashes the input files beside the merge, one chunk in memory."""

    def __init__(self, plan: Plan) -> None:
        self._files = list(dict.fromkeys(path for item in plan.inputs for path in item.files))
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


def slices(tensor: TensorPlan) -> Sequence[int | None]:
    """Return the numbers of a stack's matrices; [None] for a tensor that is one matrix."""
    return [None] if tensor.slices is None else range(tensor.slices)


def matrix_seed(tensor: TensorPlan, index: int | None, seed: int) -> int:
    """Return the seed of whatever is random in the merge of one matrix."""
    return tensor.seed if index is None else seed_for(matrix_name(tensor, index), seed)


def matrix_name(tensor: TensorPlan, index: int | None) -> str:
    """Return the name of one matrix: the tensor's, with its number in a stack."""
    return tensor.name if index is None else f"{tensor.name}[{index}]"


def _smaller(merged: MergedDelta) -> Update:
    """Return the update in whichever form has fewer numbers."""
    low = merged.low_rank()
    if low is None:
        return merged.dense()
    (m, n), k = low.shape, low.rank
    return LowRank(*_without_core(low)) if (m + n) * k < m * n else low.dense()


def _without_core(low: LowRank) -> tuple[Tensor, None, Tensor]:
    left, right = low.folded()
    return left, None, right


def _extend(record: TensorRecord, merged: MergedDelta) -> None:
    """Add one matrix's record to its tensor's."""
    own = merged.record
    low = merged.low_rank()
    if low is not None:
        record.rank = max(record.rank or 0, low.rank)
    energy = [float(value) for value in own.energy]
    if record.energy and len(record.energy) == len(energy):
        energy = [min(pair) for pair in zip(record.energy, energy, strict=True)]
    record.energy = energy
    for mine, theirs in ((record.fallbacks, own.fallbacks), (record.notes, own.notes)):
        mine.extend(text for text in theirs if text not in mine)


def _chunks(shape: Sequence[int], common: int | None = None) -> Iterator[Rows]:
    """Yield row ranges of about CHUNK_BYTES in float32, none across row `common`; (None, None) is all.

    With `common` the ranges are always explicit: a fine-tune may have more rows than the base.
    """
    rows = shape[0] if shape else 1
    step = max(1, CHUNK_BYTES // max(1, 4 * math.prod(shape[1:])))
    if not shape or (step >= rows and common is None):
        yield None, None
        return
    edge = rows if common is None else common
    for begin, end in ((0, edge), (edge, rows)):
        for start in range(begin, end, step):
            yield start, min(start + step, end)


def _row_range(update: LowRank, start: int | None, stop: int | None) -> LowRank:
    return LowRank(update.left[start:stop], update.core, update.right)


def _check_finite(value: Tensor, info: TensorInfo, item: Input) -> Tensor:
    if value.is_floating_point() and not math.isfinite(_largest(value)):
        raise NonFiniteError(f"{_place(info, item)}: tensor {info.name!r} holds NaN or Inf")
    return value


def _largest(value: Tensor) -> float:
    """The largest magnitude, NaN where there is one, in one pass."""
    if value.numel() == 0:
        return 0.0
    low, high = torch.aminmax(value)
    return max(-float(low), float(high)) if bool(low == low) else math.nan


def _place(info: TensorInfo, item: Input) -> str:
    return str(info.file) if info.file is not None else item.label


def _work(tensor: TensorPlan) -> float:
    return tensor.flops + FLOPS_PER_BYTE * tensor.nbytes


def _base_name(plan: Plan) -> str | None:
    if plan.recipe.base_model is not None and isinstance(plan.recipe.base_model.source, str):
        return plan.recipe.base_model.source
    names = [task.adapter.base_name for task in plan.tasks if task.adapter is not None]
    return next((name for name in names if name), None)


def _copy_side_files(plan: Plan, folder: Path) -> None:
    """Copy the base's configuration and the tokenizer that the recipe asks for."""
    base = plan.base.checkpoint if plan.base is not None else None
    if base is not None and base.path is not None:
        source = base.path if base.path.is_dir() else base.path.parent
        copy_side_files(source, folder, dtype=plan.recipe.output_dtype)
    finish_tokenizer(plan, folder)


def _peak_rss() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
