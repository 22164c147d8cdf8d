"""Decisions that depend on values, without waiting for the device: taken for granted first, read later.

A program that asks a GPU whether a matrix is well conditioned waits for everything that it has queued.
Inside a ledger such a question is answered by its usual answer, yes, and noted; one read at the end says
whether all answers were right. Where one was not, the work is done again outside a ledger, and waits.

    with deferred() as ledger:
        result = merge()          # asks holds(condition), uses number(x)
    flag, energy = read([ledger.flag(), result.energy])
    if not flag:
        result = merge()

`optimistic` is this for a batch. On a CPU nothing is deferred: reading costs nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
from torch import Tensor

# Public, but not among the names that torch.linalg exports to type checkers.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

T = TypeVar("T")


class Ledger:
    """The conditions that a piece of work took for granted.

    Args:
        on_cpu: whether decisions about CPU tensors are deferred too.
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self._conditions: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._conditions)

    def covers(self, device: torch.device) -> bool:
        """Returns whether decisions about tensors of a device are deferred."""
        return self.on_cpu or device.type != "cpu"

    def record(self, condition: Tensor) -> None:
        """Notes a condition, a bool tensor of any shape on a device."""
        self._conditions.append(condition if condition.ndim == 0 else condition.all())

    def flag(self) -> Tensor:
        """Returns whether all conditions hold, a 0-d bool tensor on their device; true if there are none."""
        if not self._conditions:
            return torch.ones((), dtype=torch.bool)
        if len(self._conditions) > 1:
            self._conditions = [torch.stack(self._conditions).all()]
        return self._conditions[0]


_ledger: ContextVar[Ledger | None] = ContextVar("dirmerge_ledger", default=None)


@contextmanager
def deferred(*, on_cpu: bool = False) -> Iterator[Ledger]:
    """Defers the decisions of the block: `holds` answers yes for tensors on a device and notes the condition.

    It acts on the current thread or asyncio task. A block inside another has a ledger of its own, so that the
    outer one does not learn what the inner one took for granted.

    Args:
        on_cpu: whether decisions about CPU tensors are deferred too, which shows what a device would compute
            where there is none.
    """
    ledger = Ledger(on_cpu=on_cpu)
    token = _ledger.set(ledger)
    try:
        yield ledger
    finally:
        _ledger.reset(token)


@contextmanager
def careful() -> Iterator[None]:
    """Runs the block as if it were outside a ledger: every decision is read from the device."""
    token = _ledger.set(None)
    try:
        yield
    finally:
        _ledger.reset(token)


def is_deferred(x: Tensor | torch.device) -> bool:
    """Returns whether decisions about x wait for the end of a ledger: x is on a device, and there is one."""
    ledger = _ledger.get()
    return ledger is not None and ledger.covers(x if isinstance(x, torch.device) else x.device)


def holds(condition: Tensor) -> bool:
    """Returns whether all of a condition is true; where decisions are deferred, notes it and returns True.

    Args:
        condition: bool tensor of any shape, true in the usual, good case.
    """
    ledger = _ledger.get()
    if ledger is None or not ledger.covers(condition.device):
        return bool(condition.all())
    ledger.record(condition)
    return True


def number(x: Tensor) -> float:
    """Returns a 0-d tensor as a float; where decisions are deferred, the tensor itself in float64.

    The tensor takes part in sums and products as a float would. Whoever opened the ledger puts the number in
    its place, by `read`.
    """
    return cast(float, x.double()) if is_deferred(x) else float(x)


def read(values: Sequence[Tensor | float]) -> list[float]:
    """Copies 0-d tensors to the host as floats: one copy for all that are on a device.

    Args:
        values: bool, integer or floating 0-d tensors of at most one device beside the CPU; floats come back
            as they are.

    Returns:
        One float for each, 1.0 for true and 0.0 for false.
    """
    away = [v.double() for v in values if isinstance(v, Tensor) and not v.is_cpu]
    arrived = iter(torch.stack(away).cpu().tolist() if away else ())
    return [next(arrived) if isinstance(v, Tensor) and not v.is_cpu else float(v) for v in values]


def optimistic(
    runs: Sequence[Callable[[], T]],
    numbers: Callable[[T], Sequence[float]],
    replace: Callable[[T, Sequence[float]], T],
    *,
    on_cpu: bool = False,
) -> tuple[list[T], list[bool]]:
    """Runs a batch of work with deferred decisions, reads once, and repeats what took too much for granted.

    Args:
        runs: each does its work and returns the result; it may be called twice and must change nothing that
            it does not make.
        numbers: returns what a result got from `number`.
        replace: returns a result with those numbers as floats, in the same order.
        on_cpu: whether decisions about CPU tensors are deferred too.

    Returns:
        The results, and for each whether it was run again: its conditions did not hold, or a factorisation
        failed on what they would have excluded.
    """
    attempts: list[tuple[T, Tensor] | None] = []
    for run in runs:
        with deferred(on_cpu=on_cpu) as ledger:
            try:
                attempts.append((run(), ledger.flag()))
            # Work on NaN, which a decision would have kept out, may fail: the careful run finds the reason.
            except (ValueError, LinAlgError):
                attempts.append(None)
    wanted: list[Tensor | float] = []
    for attempt in attempts:
        if attempt is not None:
            wanted += [attempt[1], *numbers(attempt[0])]
    values = iter(read(wanted))
    results: list[T] = []
    again: list[bool] = []
    for run, attempt in zip(runs, attempts, strict=True):
        is_good = False
        if attempt is not None:
            is_good = next(values) == 1.0
            found = attempt[0]
            own = [next(values) for _ in numbers(found)]
        if is_good:
            results.append(replace(found, own))
        else:
            with careful():
                results.append(run())
        again.append(not is_good)
    return results, again
