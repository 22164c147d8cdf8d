"""What the learned form of the alignment returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dirmerge.alignment.guard import Reading
from dirmerge.alignment.heads import CallableHead, Head
from dirmerge.alignment.model import Model


@dataclass(frozen=True)
class LearnProgress:
    """One step of the learning: its number from 1, their total, the loss on its batches, seconds so far."""

    step: int
    steps: int
    loss: float
    seconds: float


@dataclass(eq=False)
class Learned:
    """Result of the learning: the best state among those that the guard accepts.

    The best is the one whose predictions agree most with those of the tasks' own fine-tunes, where these were
    given, and else the one of the lowest unsupervised loss.

    Attributes:
        model: the merged model.
        scales: λ of every parameter, one per component.
        matrices: per task the (d, d) map before its head, start map times learned rotation; None without.
        heads: per task the head with its map folded in.
        best_step: number of steps after which this state was reached; 0 is the start.
        steps: number of steps that were run.
        stopped: reason why the run ended early, None if it did not.
        history: readings of the guard.
        seconds: wall time of this run.
    """

    model: Model
    scales: dict[str, list[float]]
    matrices: list[Tensor | None]
    heads: list[Head | CallableHead]
    best_step: int
    steps: int
    stopped: str | None
    history: list[Reading] = field(repr=False)
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but tensors as plain data (JSON)."""
        return {
            "best_step": self.best_step,
            "steps": self.steps,
            "stopped": self.stopped,
            "scales": self.scales,
            "history": [reading.to_dict() for reading in self.history],
            "seconds": round(self.seconds, 3),
        }
