"""Weights on disk: copied into a module that exists, or turned into updates, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dirmerge.alignment.model import Model
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.deltas import DeltaReader
from dirmerge.methods.tasks import Delta
from dirmerge.planning import TensorPlan

ReadWeight = Callable[[str], Tensor]
"""Reads a weight by its name in the merge, in its stored dtype."""


@torch.no_grad()
def fill(module: torch.nn.Module, names: Mapping[str, str], read: ReadWeight) -> None:
    """Copies weights into a module's parameters, in the module's dtype and on its device.

    One weight is in memory beside the module at a time.

    Args:
        module: its parameters are overwritten.
        names: the module's names by those of the merge.
        read: reads a weight by its name in the merge.

    Raises:
        ValueError: a weight has another shape than the parameter.
    """
    parameters = dict(module.named_parameters())
    for name, inner in names.items():
        value = read(name)
        if value.shape != parameters[inner].shape:
            raise ValueError(
                f"{name} must have the module's shape {tuple(parameters[inner].shape)}, got "
                f"{tuple(value.shape)}"
            )
        parameters[inner].copy_(value)


@torch.no_grad()
def absorb(model: Model) -> Model:
    """Copies a model's weights into its module; returns the model without weights beside it, on the CPU."""
    fill(model.module, {name: name for name in model.weights}, model.weights.__getitem__)
    return Model(model.module.cpu())


class UpdateReader(Mapping[str, Sequence[Delta]]):
    """The updates of parameters by their name in a module, read when they are asked for and not kept.

    Args:
        tensors: by the module's name.
        read: returns a tensor's updates.
    """

    def __init__(
        self, tensors: Mapping[str, TensorPlan], read: Callable[[TensorPlan], Sequence[Delta]]
    ) -> None:
        self._tensors = tensors
        self._read = read

    def __getitem__(self, name: str) -> Sequence[Delta]:
        return self._read(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def updated_weight(reader: DeltaReader, tensor: TensorPlan, t: int, device: torch.device) -> Tensor:
    """Computes W_t of fine-tune t from W_0 and its delta, in float32 or wider on a device."""
    value = wide(reader.base(tensor.name), device)
    delta = reader.delta(tensor, t)
    return value if delta is None else value + _dense(delta.to(device))


def weighted_deltas(reader: DeltaReader, tensor: TensorPlan, device: torch.device) -> list[Delta]:
    """Returns the deltas of all fine-tunes on a device, times their weights in the recipe."""
    found: list[Delta] = []
    for source in tensor.sources:
        delta = reader.delta(tensor, source.task)
        if delta is None:
            found.append(torch.zeros(tensor.shape, device=device))
        elif isinstance(delta, LowRank):
            found.append(delta.to(device).scaled(source.weight))
        else:
            found.append(delta.to(device) * source.weight)
    return found


def wide(value: Tensor, device: torch.device) -> Tensor:
    """Returns a floating weight in float32 on a device; it is copied there in its stored dtype."""
    moved = value.to(device)
    return moved.float() if moved.is_floating_point() else moved


def _dense(delta: Delta) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta
