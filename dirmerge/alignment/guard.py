"""The guard: predictions on watched batches, compared with those at the start and of the fine-tunes."""

from __future__ import annotations

import math
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
        own: per task the fraction of predictions equal to those of the task's own fine-tune, None where these
            are not known.
    """

    step: int
    loss: float
    agreement: tuple[float, ...]
    shift: tuple[float, ...]
    within: bool
    own: tuple[float, ...] | None = None

    @property
    def score(self) -> tuple[float, float]:
        """What the best state is the best by: agreement with the fine-tunes where known, then the loss."""
        return (0.0 if self.own is None else sum(self.own) / len(self.own), -self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON)."""
        return asdict(self)


def read(
    step: int,
    loss: float,
    start: Sequence[Tensor],
    now: Sequence[Tensor],
    min_agreement: float,
    max_shift: float,
    references: Sequence[Tensor] | None = None,
) -> Reading:
    """Compares predicted classes with those at the start, task by task, and with those of the fine-tunes.

    With `references` a state is not accepted either where more predictions stopped being the fine-tune's than
    became so, by more than twice the standard error of that difference over all tasks, √(lost + gained).

    Args:
        step: steps done.
        loss: the unsupervised loss.
        start: per task (n,) predicted classes at the start.
        now: the same now.
        min_agreement: least agreement of a task.
        max_shift: largest shift of a task's histogram.
        references: per task (n,) classes that its own fine-tune predicts.
    """
    agreement = tuple(float((a == b).double().mean()) for a, b in zip(start, now, strict=True))
    shift = tuple(_shift(a, b) for a, b in zip(start, now, strict=True))
    within = min(agreement) >= min_agreement and max(shift) <= max_shift
    own = None
    if references is not None:
        then, here = (
            torch.cat([x == r for x, r in zip(side, references, strict=True)]) for side in (start, now)
        )
        lost, gained = int((then & ~here).sum()), int((here & ~then).sum())
        within = within and lost - gained <= 2 * math.sqrt(lost + gained)
        own = tuple(float((x == r).double().mean()) for x, r in zip(now, references, strict=True))
    return Reading(step, loss, agreement, shift, within and math.isfinite(loss), own)


def complaint(
    reading: Reading, first: Reading, names: Sequence[str], min_agreement: float, max_shift: float
) -> str:
    """Returns the sentence that says why a run was stopped."""
    if not math.isfinite(reading.loss):
        return f"stopped at step {reading.step}: the loss is not finite; lower the rates"
    worst = min(range(len(names)), key=lambda t: reading.agreement[t])
    if reading.agreement[worst] < min_agreement:
        what = (
            f"task {names[worst]} keeps {100 * reading.agreement[worst]:.0f} % of its first predictions "
            f"(at least {100 * min_agreement:.0f} % are required)"
        )
    elif max(reading.shift) <= max_shift:
        return (
            f"stopped at step {reading.step}: {100 * reading.score[0]:.1f} % of the watched predictions are "
            f"those of the tasks' own fine-tunes, {100 * first.score[0]:.1f} % at the start; lower lr_scale "
            "or lr_rotation"
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
