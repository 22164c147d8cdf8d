"""Merged updates that wait for λ: in memory while a budget allows it, else on disk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dirmerge.checkpoints.spool import Spool
from dirmerge.deltas.lowrank import LowRank
from dirmerge.engine.compute import CPU
from dirmerge.planning import TensorPlan


class WaitingUpdates:
    """Updates by the names of their matrices; each is taken once.

    Args:
        folder: on whose file system those wait that do not fit into memory.
        budget: bytes that may wait on each device; what has no room there waits in the host's memory or on
            the disk.
    """

    def __init__(self, folder: Path, budget: Mapping[torch.device, int]) -> None:
        self._folder = folder
        self._left = dict(budget)
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

    def device_of(self, tensor: TensorPlan) -> torch.device | None:
        """Returns the device on which the update of a tensor waits, of a stack that of its first matrix."""
        update = self._held.get(tensor.name, self._held.get(f"{tensor.name}[0]"))
        return None if update is None else update.device

    def put(self, name: str, update: Tensor | LowRank) -> None:
        """Lets an update wait.

        Raises:
            OutputError: it cannot be written to the disk.
        """
        size = update_bytes(update)
        for device in (update.device, CPU):
            with self._lock:
                fits = size <= self._left.get(device, 0)
                if fits:
                    self._left[device] -= size
            update = update if update.device == device else update.to(device)
            if fits:
                with self._lock:
                    self._held[name] = update
                return
        with self._lock:
            if self._spool is None:
                self._spool = Spool(self._folder)
            self._spool.put(name, update)

    def get(self, name: str) -> Tensor | LowRank:
        """Takes an update; KeyError for one that does not wait."""
        with self._lock:
            update = self._held.pop(name, None)
            if update is not None:
                self._left[update.device] += update_bytes(update)
                return update
            if self._spool is None:
                raise KeyError(name)
            return self._spool.get(name)


def update_bytes(update: Tensor | LowRank) -> int:
    """Returns the bytes that an update holds."""
    parts = (update.left, update.core, update.right) if isinstance(update, LowRank) else (update,)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)
