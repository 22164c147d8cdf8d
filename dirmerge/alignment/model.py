"""Models run with other weights than their own, and features read from them on unlabelled batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from dirmerge.alignment.heads import AnyHead, as_head
from dirmerge.deltas.lowrank import LowRank
from dirmerge.methods.tasks import Delta

Batch: TypeAlias = Tensor | Mapping[str, Any]
"""One batch of unlabelled inputs: a mapping is passed by keyword, a tensor as the only argument."""


class Model:
    """A module run with given weights, f(x; W), by torch.func.functional_call; the module's own stay.

    Args:
        module: any module; put it into evaluation mode, or dropout makes its features random.
        weights: by name; parameters and buffers that are not named are the module's own.

    Raises:
        ValueError: a name the module does not have, or another shape than its own.
    """

    def __init__(self, module: torch.nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, value in (weights or {}).items():
            if name not in own:
                raise ValueError(f"weights must be parameters of the module, got {name!r}")
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{name} must have the module's shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
                )
        self.module = module
        self.weights = dict(weights or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return torch.func.functional_call(self.module, self.weights, args, kwargs)

    def run(self, batch: Batch) -> Any:
        """The module's output for one batch."""
        return self(**batch) if isinstance(batch, Mapping) else self(batch)

    def weight(self, name: str) -> Tensor:
        """One of the weights that the model runs with."""
        return self.weights[name] if name in self.weights else self.module.get_parameter(name)

    @torch.no_grad()
    def updated(self, updates: Mapping[str, Delta], scale: float | Mapping[str, float] = 1.0) -> Model:
        """The model with W + λ D for every update D.

        Args:
            updates: by parameter name, dense or LowRank.
            scale: λ, one for all or by name.
        """
        weights = dict(self.weights)
        for name, update in updates.items():
            factor = scale[name] if isinstance(scale, Mapping) else scale
            base = self.weight(name)
            dense = update.dense() if isinstance(update, LowRank) else update
            weights[name] = torch.add(base.to(dense.dtype), dense.to(base.device), alpha=factor).to(
                base.dtype
            )
        return Model(self.module, weights)


FeatureReader: TypeAlias = Callable[[Model, Batch], Tensor]
"""What turns a model and a batch into (n, d) features, such as those of `dirmerge.alignment.features`."""


@dataclass(frozen=True, eq=False)
class AlignmentTask:
    """One task: its unlabelled inputs, its frozen head, and how its features are read.

    Attributes:
        name: names its head's file.
        batches: a sequence of batches, read by index as often as needed, or any finite iterable, which is
            read once and kept. No labels.
        head: what turns features into logits: a Head, or any callable.
        features: reads (n, d) features from a model's run on a batch.
    """

    name: str
    batches: Sequence[Batch] | Iterable[Batch]
    head: AnyHead
    features: FeatureReader

    def __post_init__(self) -> None:
        sequence = isinstance(self.batches, Sequence) and not isinstance(self.batches, Mapping)
        batches = self.batches if sequence else list(self.batches)
        if not len(batches):  # type: ignore[arg-type]  # a sequence by now
            raise ValueError(f"task {self.name}: batches must not be empty")
        object.__setattr__(self, "batches", batches)
        object.__setattr__(self, "head", as_head(self.head))

    def read(self, model: Model, batch: Batch) -> Tensor:
        """(n, d) features of one batch as the head wants them, in float32 or wider, on the model's device.

        Raises:
            ValueError: the reader gave something else.
        """
        found = self.features(model, batch_on(batch, device_of(model)))
        if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"task {self.name}: features must be a floating tensor (n, d), got {shape}")
        return as_head(self.head).prepare(found.to(torch.promote_types(found.dtype, torch.float32)))

    def batch_list(self) -> Sequence[Batch]:
        """The batches, as the sequence they are by now."""
        assert isinstance(self.batches, Sequence)  # __post_init__
        return self.batches


@contextlib.contextmanager
def autocast(device: torch.device, enabled: bool) -> Iterator[None]:
    """Runs the model in bfloat16 where autocast does; losses and features stay float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


def device_of(model: Model) -> torch.device:
    """Where the model's weights are."""
    first = next(model.module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def batch_on(batch: Batch, device: torch.device) -> Batch:
    """Returns a batch with its tensors on a device; the batch itself where they are there already."""
    if isinstance(batch, Mapping):
        tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        if all(value.device == device for value in tensors.values()):
            return batch
        return {**batch, **{key: value.to(device) for key, value in tensors.items()}}
    return batch.to(device) if isinstance(batch, Tensor) else batch


_Own = TypeVar("_Own")


def paired(tasks: Sequence[AlignmentTask], own: Iterable[_Own]) -> Iterator[tuple[AlignmentTask, _Own]]:
    """Yields every task with its own fine-tune, one at a time.

    Raises:
        ValueError: there are not as many fine-tunes as tasks.
    """
    sources = iter(own)
    for task in tasks:
        source = next(sources, None)
        if source is None:
            raise ValueError(f"own must have one fine-tune per task, none is left for {task.name}")
        yield task, source
        del source  # before the next one is made
    if next(sources, None) is not None:
        raise ValueError(f"own must have one fine-tune per task, got more than {len(tasks)}")


@torch.no_grad()
def read_features(model: Model | torch.nn.Module, task: AlignmentTask, *, bf16: bool = False) -> Tensor:
    """Computes the (n, d) features of all a task's batches, on the CPU.

    Args:
        model: the model, or a module to run with its own weights.
        task: its batches and reader.
        bf16: run under bfloat16 autocast.

    Raises:
        ValueError: features that are no (n, d) floating tensor, or hold NaN or Inf.
    """
    chosen = model if isinstance(model, Model) else Model(model)
    with autocast(device_of(chosen), bf16):
        z = torch.cat([task.read(chosen, batch).cpu() for batch in task.batch_list()])
    if not bool(torch.isfinite(z).all()):
        raise ValueError(f"task {task.name}: features must be finite, got NaN or Inf")
    return z
