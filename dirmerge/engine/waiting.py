"""Merged updates that wait for λ: in memory while a budget allows it, else on disk."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from torch import Tensor

from dirmerge.checkpoints.spool import Spool
from dirmerge.deltas.lowrank import LowRank


class WaitingUpdates:
    """Updates by the names of their matrices; each is taken once.

    Args:
        folder: on whose file system those wait that do not fit into memory.
        budget: bytes that may wait in memory.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._left = budget
        self._held: dict[str, Tensor | LowRank] = {}
        self._spool: Spool | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> WaitingUpdates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = {}
        if self._spool is not None:
            self._spool.close()

    def __contains__(self, name: object) -> bool:
        return name in self._held or (self._spool is not None and name in self._spool)

    def put(self, name: str, update: Tensor | LowRank) -> None:
        """Lets an update wait.

        Raises:
            OutputError: it cannot be written to the disk.
        """
        size = update_bytes(update)
        with self._lock:
            if size <= self._left:
                self._left -= size
                self._held[name] = update
                return
            if self._spool is None:
                self._spool = Spool(self._folder)
            self._spool.put(name, update)

    def get(self, name: str) -> Tensor | LowRank:
        """Takes an update; KeyError for one that does not wait."""
        with self._lock:
            update = self._held.pop(name, None)
            if update is not None:
                self._left += update_bytes(update)
                return update
            if self._spool is None:
                raise KeyError(name)
            return self._spool.get(name)


def update_bytes(update: Tensor | LowRank) -> int:
    """Returns the bytes that an update holds."""
    parts = (update.left, update.core, update.right) if isinstance(update, LowRank) else (update,)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
