"""Feature maps in closed form: from the merged model's features to those of a task's own fine-tune."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dirmerge.alignment.heads import CallableHead, Head, as_head
from dirmerge.alignment.model import AlignmentTask, Model, device_of, paired, read_features
from dirmerge.linalg import procrustes

MapKind = Literal["rotation", "ridge"]


def ridge_map(a: Tensor, b: Tensor, ridge: float = 0.3, rotation: Tensor | None = None) -> Tensor:
    """Computes M = R + (AᵀA + lI)⁻¹ Aᵀ(B − A R), l = ridge · ‖A‖²_F / d, by Cholesky in float64.

    Ridge regression towards the rotation instead of towards zero: with few inputs, or a large ridge, M is the
    rotation. For unit features l is ridge · n / d.

    Args:
        a: (n, d) features to map.
        b: (n, d) their targets.
        ridge: strength, positive.
        rotation: (d, d) R; default procrustes(a, b).

    Returns:
        (d, d) M with A M ≈ B.

    Raises:
        ValueError: shapes that differ, NaN or Inf, or a ridge that is not positive.

    Source:
        this project: linear distillation of a fine-tune into a d × d map.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    r = procrustes(a, b) if rotation is None else rotation
    left, right, start = a.double(), b.double(), r.double()
    gram = left.T @ left
    d = gram.shape[0]
    level = ridge * float(gram.diagonal().sum()) / d
    if level == 0:
        return r  # all features are zero: nothing to learn from
    gram.diagonal().add_(level)
    factor = torch.linalg.cholesky(gram)
    found = start + torch.cholesky_solve(left.T @ (right - left @ start), factor)
    return found.to(torch.promote_types(a.dtype, b.dtype))


def feature_map(a: Tensor, b: Tensor, kind: MapKind = "rotation", ridge: float = 0.3) -> Tensor:
    """Computes the map of a kind: procrustes(a, b), or ridge_map(a, b)."""
    if kind == "rotation":
        return procrustes(a, b)
    if kind == "ridge":
        return ridge_map(a, b, ridge)
    raise ValueError(f"kind must be rotation or ridge, got {kind!r}")


@dataclass(frozen=True)
class Fit:
    """How near features are to those of the task's own fine-tune, without any label.

    Attributes:
        distance: ‖A M − B‖_F / ‖B‖_F.
        agreement: fraction of inputs to which the head gives the class it gives to the fine-tune's features.
    """

    distance: float
    agreement: float


@dataclass(frozen=True, eq=False)
class TaskMap:
    """The closed form of one task.

    Attributes:
        name: of the task.
        matrix: (d, d) the map, fitted on all inputs.
        head: the task's head with the map folded in.
        inputs: how many there were.
        held_out: how many of them the fits below were measured on, with maps fitted on the others; 0 if they
            were measured on what the map was fitted on.
        plain: the merged model without a map.
        aligned: with its map.
        control: the base model, nothing merged, with a map of the same kind: what the map alone can do. None
            only where no base was given.
    """

    name: str
    matrix: Tensor
    head: Head | CallableHead
    inputs: int
    held_out: int
    plain: Fit
    aligned: Fit
    control: Fit | None


def closed_form(
    merged: Model,
    tasks: Sequence[AlignmentTask],
    own: Iterable[Model | torch.nn.Module | Tensor],
    *,
    base: Model | torch.nn.Module | None = None,
    kind: MapKind = "rotation",
    ridge: float = 0.3,
    held_out: float = 0.2,
    bf16: bool = False,
) -> list[TaskMap]:
    """Fits every task's map M_t from the merged model's features to its own fine-tune's, without training.

    M_t is the Procrustes rotation, or the ridge map; it folds into the task's head.

    Args:
        merged: the merged model.
        tasks: their unlabelled inputs, a few hundred each, heads and feature readers.
        own: per task its fine-tune, or (n, d) its features as read_features gives them; read one at a time,
            so a generator keeps one fine-tune in memory.
        base: the base model, for the control.
        kind: rotation or ridge.
        ridge: strength of the ridge.
        held_out: fraction of the inputs that the reported fits are measured on.
        bf16: run the models under bfloat16 autocast.

    Returns:
        One TaskMap per task, on the CPU; the maps are computed on the merged model's device.

    Raises:
        ValueError: as many fine-tunes as tasks are needed, features must fit, and held_out lie in [0, 1).

    Source:
        Procrustes: MDA (arXiv 2512.00391), its rotation, here in closed form; the ridge map: this project.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    results = []
    for task, source in paired(tasks, own):
        b = source if isinstance(source, Tensor) else read_features(source, task, bf16=bf16)
        del source  # before the next one is made
        a = read_features(merged, task, bf16=bf16)
        if a.shape != b.shape:
            raise ValueError(
                f"task {task.name}: features of the merged model and of the fine-tune must have one shape, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        control = None if base is None else read_features(base, task, bf16=bf16)
        results.append(
            fit_task(task, a, b, control, kind=kind, ridge=ridge, held_out=held_out, device=device_of(merged))
        )
    return results


def fit_task(
    task: AlignmentTask,
    a: Tensor,
    b: Tensor,
    control: Tensor | None,
    *,
    kind: MapKind,
    ridge: float,
    held_out: float,
    device: torch.device | None = None,
) -> TaskMap:
    """Fits one task's map from its features; see closed_form.

    Args:
        task: its name and head.
        a: (n, d) features of the merged model.
        b: (n, d) features of the task's own fine-tune.
        control: (n, d) features of the base, None for no control.
        kind: rotation or ridge.
        ridge: strength of the ridge.
        held_out: fraction of the inputs that the reported fits are measured on.
        device: where maps and fits are computed; default: where `a` is.
    """
    device = a.device if device is None else device
    a, b = a.to(device), b.to(device)
    head = as_head(task.head).on(device)
    n = a.shape[0]
    # Every k-th input is held out, not the last ones: inputs are often sorted by length or class.
    aside = torch.zeros(n, dtype=torch.bool)
    if held_out > 0 and n > 1:
        aside[torch.linspace(0, n - 1, max(1, int(held_out * n))).round().long()] = True
    count = int(aside.sum())
    train, test = ((~aside).to(device), aside.to(device)) if count else (slice(None), slice(None))
    matrix = feature_map(a, b, kind, ridge)
    fitted = feature_map(a[train], b[train], kind, ridge) if count else matrix
    found = None
    if control is not None:
        control = control.to(device)
        found = _fit(head, control[test] @ feature_map(control[train], b[train], kind, ridge), b[test])
    return TaskMap(
        task.name,
        matrix.cpu(),
        as_head(task.head).folded(matrix.cpu()),
        n,
        count,
        _fit(head, a[test], b[test]),
        _fit(head, a[test] @ fitted, b[test]),
        found,
    )


@torch.no_grad()
def _fit(head: Head | CallableHead, z: Tensor, b: Tensor) -> Fit:
    distance = torch.linalg.matrix_norm(z - b) / torch.linalg.matrix_norm(b)
    same = head.logits(z).argmax(1) == head.logits(b).argmax(1)
    return Fit(float(distance), float(same.double().mean()))
