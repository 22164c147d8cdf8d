"""The rules that write a tensor of the output: base, mean, take, identical, and W_0 + λ D of a merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.deltas import DeltaReader, row_range
from dirmerge.engine.result import TensorRecord
from dirmerge.engine.sinks import MemorySink, Sink
from dirmerge.errors import MismatchError, NonFiniteError
from dirmerge.linalg import svd_truncated
from dirmerge.planning import Plan, TensorPlan

# Rows are read, added and written in chunks of about this size in float32.
CHUNK_BYTES = 64 << 20

Update = Tensor | LowRank
Rows = tuple[int | None, int | None]


class RuleWriter:
    """Writes tensors by their rules, in chunks of rows.

    Args:
        plan: of the merge.
        reader: of its inputs.
        sink: takes the tensors.
    """

    def __init__(self, plan: Plan, reader: DeltaReader, sink: Sink) -> None:
        self.plan = plan
        self.reader = reader
        self.sink = sink

    def write(self, tensor: TensorPlan) -> None:
        """Writes a tensor of any rule but `merge`, which needs the update."""
        match tensor.rule:
            case "mean" | "common_rows":
                self._write_mean(tensor)
            case "base":
                for start, stop in row_chunks(tensor.shape):
                    value = self.reader.base(tensor.name, start, stop, check=False)
                    self.sink.write(tensor, value.to(tensor.dtype), start)
            case "take":
                self._write_taken(tensor)
            case "identical":
                self._write_identical(tensor)
            case "merge" | "tied" | "drop":
                pass

    def check(self) -> None:
        """Checks what the plan took for granted: copies of base weights in adapters, and ties.

        Raises:
            MismatchError: a copy or a tied tensor differs from the other.
        """
        self.reader.check_base_copies()
        for tensor in self.plan.tensors:
            if tensor.rule == "tied":
                self._check_tied(tensor)

    def add(self, tensor: TensorPlan, index: int | None, update: Update, scale: float) -> None:
        """Writes W_0 + λ D of one matrix: a chunk of rows at a time, a stack matrix by matrix."""
        shape = tensor.shape if index is None else (1, *tensor.shape[1:])
        factors = dense = None
        if isinstance(update, LowRank):
            factors = update.folded()
        else:
            dense = update.reshape(shape)
        for start, stop in row_chunks(tensor.shape) if index is None else [(index, index + 1)]:
            base = self.reader.base(tensor.name, start, stop)
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

    def write_module(
        self, tensor: TensorPlan, update: Update, scale: float, record: TensorRecord | None
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
        if record is not None:
            record.rank = update.rank
            record.kept_energy = kept
        self.sink.update(tensor, update.scaled(scale))

    def _write_mean(self, tensor: TensorPlan) -> None:
        if self.plan.output == "adapter" and tensor.module is not None:
            total = sum(source.weight for source in tensor.sources)
            parts = [
                self.reader.low_rank(source).scaled(source.weight / total)
                for source in tensor.sources
                if source.weight != 0
            ]
            self.write_module(tensor, LowRank.sum(parts), 1.0, None)
            return
        total = sum(source.weight for source in tensor.sources)
        updates = self.reader.low_ranks(tensor)
        common = tensor.rows
        for start, stop in row_chunks(tensor.shape, common):
            base = self.reader.base(tensor.name, start, stop) if tensor.in_base else None
            if common is not None and start is not None and start >= common:
                assert base is not None  # only common_rows has rows beyond the common ones
                self._put(tensor, base.to(tensor.dtype), start)
                continue
            mean: Tensor | None = None
            for source in tensor.sources:
                if source.weight == 0:
                    continue
                part = self.reader.rows(tensor, source, base, start, stop, updates.get(source.task))
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
            self.write_module(tensor, self.reader.low_rank(source), 1.0, None)
            return
        update = self.reader.low_ranks(tensor).get(source.task)
        for start, stop in row_chunks(tensor.shape):
            value = self.reader.value(source, start, stop)
            if value is None:
                value = self.reader.base(tensor.name, start, stop)
            if update is not None:
                value = value.to(update.dtype) + row_range(update, start, stop).dense()
            self._put(tensor, value.to(tensor.dtype), start)

    def _write_identical(self, tensor: TensorPlan) -> None:
        for start, stop in row_chunks(tensor.shape):
            first: Tensor | None = None
            where = "the base"
            if tensor.in_base:
                first = self.reader.base(tensor.name, start, stop)
            for source in tensor.sources:
                value = self.reader.value(source, start, stop)
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
        inputs = [self.reader.inputs.base] if tensor.in_base else []
        inputs += [self.reader.inputs.tasks[source.task] for source in tensor.sources]
        for item in inputs:
            if item is None or item.checkpoint is None:
                continue
            one, other = item.tensors[tensor.name], item.tensors[tensor.tied_to]
            shape = item.checkpoint.tensors[one].shape
            same = shape == item.checkpoint.tensors[other].shape
            for start, stop in row_chunks(shape):
                same = same and torch.equal(
                    item.checkpoint.read(one, start, stop), item.checkpoint.read(other, start, stop)
                )
            if not same:
                raise MismatchError(
                    f"{item.label}: {one} is declared to be tied to {other} and differs from it; set "
                    "tie_word_embeddings to false in its config.json, or treat it as a tensor of its own: "
                    f'`- {{match: "{tensor.name}", rule: mean}}` under `tensors:`'
                )
        if isinstance(self.sink, MemorySink):
            self.sink.tie(tensor.name, tensor.tied_to)

    def _put(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"{tensor.name}: the merged tensor is not finite in "
                f"{str(value.dtype).removeprefix('torch.')}; choose a wider out_dtype or a smaller scale"
            )
        self.sink.write(tensor, value, start)


def row_chunks(shape: Sequence[int], common: int | None = None) -> Iterator[Rows]:
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
