"""Where merged tensors go: a state dict, the shards of a model, a PEFT adapter."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from dirmerge.checkpoints.adapter_writer import AdapterModule, AdapterWriter
from dirmerge.checkpoints.shards import ShardedWriter
from dirmerge.deltas.lowrank import LowRank
from dirmerge.planning import Plan, TensorPlan


class Sink(Protocol):
    """Where merged tensors go, from several threads; leaving it checks that all of them have come.

    What is written is not looked at after the call: its memory may be used again.
    """

    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        """Takes a tensor, or its rows from `start` on."""

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        """Takes the update of an adapter's module."""


class MemorySink:
    """A state dict."""

    def __init__(self, plan: Plan) -> None:
        self.state_dict: dict[str, Tensor] = {}
        self._ties: dict[str, str] = {}
        self._lock = threading.Lock()
        self._order = [tensor.name for tensor in plan.tensors]

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        """Takes a tensor, or its rows from `start` on; they are copied."""
        with self._lock:
            if tensor.name not in self.state_dict:
                self.state_dict[tensor.name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            whole = self.state_dict[tensor.name]
        (whole if start is None else whole[start : start + value.shape[0]]).copy_(
            value.reshape(whole.shape if start is None else value.shape)
        )

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        """Refuses the update of a module."""
        raise TypeError("an adapter cannot be written to a state dict")

    def tie(self, name: str, other: str) -> None:
        """Gives a tensor another name."""
        self._ties[name] = other

    def __enter__(self) -> MemorySink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        for name, other in self._ties.items():
            self.state_dict[name] = self.state_dict[other]
        self.state_dict = {name: self.state_dict[name] for name in self._order if name in self.state_dict}


class ModelSink:
    """Shards in the Hugging Face layout."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.written]
        self._writer = ShardedWriter(folder, entries, plan.shard_size)

    def __enter__(self) -> ModelSink:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        """Takes a tensor, or its rows from `start` on."""
        self._writer.write(tensor.name, value, start)

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        """Refuses the update of a module."""
        raise TypeError("a model takes tensors, not updates")


class AdapterSink:
    """A PEFT adapter."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        adapters = [task.adapter for task in plan.open().tasks if task.adapter is not None]
        modules = []
        for tensor in plan.written:
            if tensor.module is not None:
                assert tensor.rank is not None
                kind = next(a.targets[tensor.module].kind for a in adapters if tensor.module in a.targets)
                shape = (tensor.shape[0], tensor.shape[1])
                modules.append(AdapterModule(tensor.module, shape, tensor.rank, kind))
        full = [(t.name, t.dtype, t.shape) for t in plan.written if t.module is None]
        task_types = {adapter.config.get("task_type") for adapter in adapters}
        dtypes = [tensor.dtype for tensor in plan.written if tensor.module is not None]
        self._writer = AdapterWriter(
            folder,
            modules,
            base_name=_base_name(plan),
            full=full,
            dtype=dtypes[0] if dtypes else torch.float32,
            task_type=task_types.pop() if len(task_types) == 1 else None,
        )

    def __enter__(self) -> AdapterSink:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, tensor: TensorPlan, value: Tensor, start: int | None) -> None:
        """Takes a tensor, or its rows from `start` on."""
        self._writer.write_full(tensor.name, value, start)

    def update(self, tensor: TensorPlan, update: LowRank) -> None:
        """Takes the update of a module."""
        assert tensor.module is not None
        self._writer.write(tensor.module, update)


def open_sink(plan: Plan, folder: Path | None) -> Sink:
    """Returns the sink of a plan's output: in a folder, or in memory without one."""
    if folder is None:
        return MemorySink(plan)
    return AdapterSink(plan, folder) if plan.output == "adapter" else ModelSink(plan, folder)


def _base_name(plan: Plan) -> str | None:
    names = [plan.base_name, *(task.base_name for task in plan.tasks)]
    return next((name for name in names if name), None)
