"""What `dirmerge.align` returns, and its progress."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dirmerge.alignment.heads import CallableHead, Head
from dirmerge.alignment.learned import Learned
from dirmerge.alignment.maps import Fit, TaskMap
from dirmerge.engine.result import MergeResult


@dataclass(frozen=True)
class AlignProgress:
    """One step of `align`: its phase (merge, features, learn, write), what was done, how many of how many."""

    phase: str
    name: str
    done: int
    total: int


@dataclass(eq=False)
class AlignResult:
    """A merged backbone with aligned heads.

    Attributes:
        path: the folder: an ordinary checkpoint, and `heads/<task>.safetensors` with JSON.
        method: of the section `align`.
        merge: the result of the merge.
        heads: the heads by task, as they were written.
        fits: per task plain, aligned and control, measured without labels; None for AdaMerging, which needs
            no map.
        learned: result of the learned form, None for a closed form.
        compute: where the models ran: device, why this one, threads and memory; `merge.compute` says where
            the merge ran.
        notes: remarks on the result.
        seconds: wall time.
    """

    path: Path
    method: str
    merge: MergeResult
    heads: dict[str, Head | CallableHead]
    fits: list[TaskMap] | None
    learned: Learned | None
    compute: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but tensors as plain data (JSON)."""
        plain: dict[str, Any] = {"method": self.method, "heads": list(self.heads), "notes": self.notes}
        plain["compute"] = self.compute
        plain["seconds"] = round(self.seconds, 3)
        if self.fits is not None:
            plain["tasks"] = {fit.name: plain_fit(fit) for fit in self.fits}
        if self.learned is not None:
            plain["learned"] = self.learned.to_dict()
        return plain


def plain_fit(fit: TaskMap) -> dict[str, Any]:
    """Returns a task's figures as plain data (JSON)."""
    plain: dict[str, Any] = {"inputs": fit.inputs, "held_out": fit.held_out}
    for name in ("plain", "aligned", "control"):
        value: Fit | None = getattr(fit, name)
        plain[name] = None if value is None else asdict(value)
    return plain
