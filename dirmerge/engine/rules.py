"""Chooses how the rows of each tensor are made, and checks what the plan took for granted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dirmerge.backends import FLOATING
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.merged_rows import FormedRows
from dirmerge.engine.reading import Read
from dirmerge.engine.rows import CopiedRows, IdenticalRows, RowRule, SummedRows, row_chunks
from dirmerge.engine.sinks import MemorySink, Sink
from dirmerge.errors import MismatchError
from dirmerge.planning import Plan, Source, TensorPlan


def row_rule(plan: Plan, reader: DeltaReader, tensor: TensorPlan, scale: float | None) -> RowRule | None:
    """Returns how the rows of a tensor are made; None for one that a method must see as a matrix.

    Args:
        plan: of the merge.
        reader: of its inputs.
        tensor: of the plan, but not a module of an adapter that is written.
        scale: λ of a merged tensor, None while it is not known.
    """
    match tensor.rule:
        case "base":
            return CopiedRows(reader, tensor, None)
        case "take":
            return CopiedRows(reader, tensor, tensor.sources[0])
        case "identical":
            return IdenticalRows(reader, tensor)
        case "mean" | "common_rows":
            total = sum(source.weight for source in tensor.sources)
            return SummedRows(reader, tensor, [source.weight / total for source in tensor.sources])
        case "merge" if scale is not None:
            form = plan.method.rows
            sources = [source for source in tensor.sources if source.weight != 0]
            dense = all(source.module is None and reader.has_value(source) for source in sources)
            if form is None or not dense or not tensor.in_base or not sources:
                return None
            dtypes = [tensor.dtype, *(read.info.dtype for read in _all_reads(reader, tensor, sources))]
            if all(dtype in FLOATING for dtype in dtypes):
                return FormedRows(reader, tensor, form, scale)
    return None


def check_inputs(plan: Plan, reader: DeltaReader, sink: Sink) -> None:
    """Checks what the plan took for granted: copies of base weights in adapters, and ties.

    Raises:
        MismatchError: a copy or a tied tensor differs from the other.
    """
    reader.check_base_copies()
    for tensor in plan.tensors:
        if tensor.rule == "tied":
            _check_tied(tensor, reader)
            if isinstance(sink, MemorySink):
                assert tensor.tied_to is not None  # of this rule
                sink.tie(tensor.name, tensor.tied_to)


def _check_tied(tensor: TensorPlan, reader: DeltaReader) -> None:
    """Checks that a tied tensor equals the one written in its place, in every input that has both."""
    assert tensor.tied_to is not None  # of this rule
    inputs = [reader.inputs.base] if tensor.in_base else []
    inputs += [reader.inputs.tasks[source.task] for source in tensor.sources]
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


def _all_reads(reader: DeltaReader, tensor: TensorPlan, sources: Sequence[Source]) -> list[Read]:
    own = [reader.value_read(source, None, None) for source in sources]
    return [reader.base_read(tensor.name, None, None), *(read for read in own if read is not None)]
