"""What every fine-tune has for a tensor, by the base's names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from dirmerge.planning.inputs import Inputs
from dirmerge.planning.problems import Problems
from dirmerge.planning.tensor_plan import Source

Shape = tuple[int, ...]


class Matching:
    """The fine-tunes' sources of every tensor, by the base's names; collects what does not fit.

    Args:
        inputs: opened, with their names matched.
        problems: takes what does not fit.
    """

    def __init__(self, inputs: Inputs, problems: Problems) -> None:
        self.base = inputs.base
        self.base_tensors = inputs.base_tensors
        self.tasks = inputs.tasks
        self.problems = problems
        self.adapters_only = all(task.adapter_only for task in inputs.tasks)

    def names(self, *, with_base: bool) -> list[str]:
        """Returns the names of all tensors, the base's first, in a fixed order."""
        names: dict[str, None] = {}
        for item in ([self.base] if with_base else []) + self.tasks:
            if item is not None:
                for mapping in (item.tensors, item.modules, item.saved):
                    names.update(dict.fromkeys(mapping))
        return list(names)

    def labels(self, numbers: Sequence[int]) -> str:
        """Returns the fine-tunes' labels, joined."""
        return ", ".join(self.tasks[t].label for t in numbers)

    def source(self, name: str, t: int, weight: float) -> tuple[Source | None, Shape]:
        """Returns what fine-tune t has for a tensor, and in which shape; (None, ()) if it has nothing."""
        task = self.tasks[t]
        saved, module, tensor = task.saved.get(name), task.modules.get(name), task.tensors.get(name)
        if saved is not None and task.adapter is not None:
            info = task.adapter.saved[saved]
            return Source(t, weight, saved=saved, dtype=info.dtype), tuple(info.shape)
        target = task.adapter.targets[module] if task.adapter is not None and module is not None else None
        if tensor is not None and task.checkpoint is not None:
            info = task.checkpoint.tensors[tensor]
            if target is not None and tuple(target.shape) != tuple(info.shape):
                self.problems.add(
                    name,
                    f"is {list(info.shape)} in {task.label} and {list(target.shape)} in its adapter",
                    "base",
                    "drop",
                )
            return Source(t, weight, tensor=tensor, module=module, dtype=info.dtype), tuple(info.shape)
        if target is not None:
            return Source(t, weight, module=module, rank=target.rank), tuple(target.shape)
        return None, ()

    def first_shape(self, name: str, low_rank_dtype: torch.dtype) -> tuple[Shape, torch.dtype]:
        """Returns the shape of the first fine-tune that has a tensor, and the widest dtype of all of them.

        Args:
            name: of a tensor that the base lacks.
            low_rank_dtype: counted for a low-rank update, which has no dtype of its own.
        """
        dtypes = []
        shape: Shape | None = None
        for t in range(len(self.tasks)):
            source, own = self.source(name, t, 1.0)
            if source is not None:
                shape = own if shape is None else shape
                dtypes.append(source.dtype or low_rank_dtype)
        return shape or (), _widest(dtypes)

    def module(self, name: str) -> str | None:
        """Returns the adapted module of a tensor, as the first adapter that has it calls it."""
        return next((task.modules[name] for task in self.tasks if name in task.modules), None)

    @cached_property
    def factor_dtype(self) -> torch.dtype:
        """The widest dtype in which a factor is stored: an adapter file gets one for all modules."""
        targets = [t for task in self.tasks if task.adapter for t in task.adapter.targets.values()]
        return _widest([info.dtype for target in targets for info in (target.a, target.b)])

    def is_unchanged_by_adapters(self, name: str, absent: Sequence[int]) -> bool:
        """Returns whether the tensor is one that full models change and no adapter does, beside adapters."""
        if self.adapters_only or not all(self.tasks[t].adapter_only for t in absent):
            return False
        touched = any(name in task.modules or name in task.saved for task in self.tasks if task.adapter_only)
        return not touched and name in self.base_tensors

    def tied_to(self, name: str) -> str | None:
        """Returns the base's tensor that `name` is another name of."""
        if self.base is None:
            return None
        if name in self.base_tensors:
            return self.base.tied.get(name)
        for task in self.tasks:
            own = task.tensors.get(name)
            if own is not None and own in task.tied:
                names = {other: mine for mine, other in task.tensors.items()}
                target = names.get(task.tied[own])
                if target is not None and target in self.base.tensors:
                    return target
        return None


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0] if dtypes else torch.float32
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
