"""The guard against collapse: predictions on watched batches, compared with those at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """One look at the watched batches.

    Attributes:
        step: steps done.
        loss: the unsupervised loss on them, mean over tasks.
        agreement: per task the fraction of predictions equal to those at the start.
        shift: per task the total variation distance between the histograms of predicted classes, now and at
            the start: the fraction of inputs that changed class on balance.
        within: whether the guard accepts the state.
    """

    step: int
    loss: float
    agreement: tuple[float, ...]
    shift: tuple[float, ...]
    within: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        return asdict(self)


def read(
    step: int,
    loss: float,
    start: Sequence[Tensor],
    now: Sequence[Tensor],
    min_agreement: float,
    max_shift: float,
) -> Reading:
    """Compares predicted classes with those at the start, task by task.

    Args:
        step: steps done.
        loss: the unsupervised loss.
        start: per task (n,) predicted classes at the start.
        now: the same now.
        min_agreement: least agreement of a task.
        max_shift: largest shift of a task's histogram.
    """
    agreement = tuple(float((a == b).double().mean()) for a, b in zip(start, now, strict=True))
    shift = tuple(_shift(a, b) for a, b in zip(start, now, strict=True))
    within = min(agreement) >= min_agreement and max(shift) <= max_shift
    return Reading(step, loss, agreement, shift, within and loss == loss and abs(loss) != float("inf"))


def complaint(reading: Reading, names: Sequence[str], min_agreement: float, max_shift: float) -> str:
    """Returns the sentence that says why a run was stopped."""
    if not abs(reading.loss) < float("inf"):
        return f"stopped at step {reading.step}: the loss is not finite; lower the rates"
    worst = min(range(len(names)), key=lambda t: reading.agreement[t])
    if reading.agreement[worst] < min_agreement:
        what = (
            f"task {names[worst]} keeps {100 * reading.agreement[worst]:.0f} % of its first predictions "
            f"(at least {100 * min_agreement:.0f} % are asked for)"
        )
    else:
        worst = max(range(len(names)), key=lambda t: reading.shift[t])
        what = (
            f"task {names[worst]} moved {100 * reading.shift[worst]:.0f} % of its predictions to other "
            f"classes on balance (at most {100 * max_shift:.0f} % are allowed)"
        )
    return f"stopped at step {reading.step}: {what}, as in a collapse; lower lr_rotation or lr_scale"


def _shift(start: Tensor, now: Tensor) -> float:
    size = int(torch.cat([start, now]).max()) + 1
    counts = [torch.bincount(x, minlength=size).double() / len(x) for x in (start, now)]
    return float((counts[0] - counts[1]).abs().sum()) / 2
