"""Streams, events and allocations of a shadow GPU, with vector clocks that tell what waits for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from shadow.gpu import Shadow


class RaceError(RuntimeError):
    """An order of operations that real streams do not guarantee."""


class Stream:
    """A queue of operations; what it has seen of the others is its clock."""

    def __init__(self, shadow: Shadow, device: int) -> None:
        self.shadow = shadow
        self.device = torch.device("cuda", device)
        self.clock: Counter[int] = Counter()
        self._effects: list[Callable[[], None]] = []  # on host memory, visible when the stream is waited for
        self._visible = 0

    def tick(self) -> int:
        """Counts one more operation, which comes after all that the host has waited for."""
        self.clock |= self.shadow.host_clock
        self.clock[id(self)] += 1
        return self.clock[id(self)]

    def later(self, effect: Callable[[], None]) -> None:
        """Notes an effect on host memory."""
        self._effects.append(effect)

    @property
    def noted(self) -> int:
        """How many effects there have been."""
        return self._visible + len(self._effects)

    def reach(self, mark: int) -> None:
        """Makes the effects up to a mark visible."""
        while self._visible < mark and self._effects:
            self._visible += 1
            self._effects.pop(0)()

    def wait_event(self, event: Event) -> None:
        """Waits for an event on the device, not on the host."""
        with self.shadow.lock:
            self.clock |= event.clock

    def wait_stream(self, other: Stream) -> None:
        """Waits on the device for all that another stream has got so far."""
        with self.shadow.lock:
            self.clock |= other.clock

    def record_event(self, event: Event | None = None) -> Event:
        """Records an event."""
        event = event or Event(self.shadow)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Waits on the host for everything in the stream."""
        self.shadow.note_sync("stream.synchronize")
        with self.shadow.lock:
            self.reach(self.noted)
            self.shadow.host_clock |= self.clock

    def query(self) -> bool:
        """Whether everything has ended; a shadow's stream never has before it is waited for."""
        return not self._effects

    @property
    def device_index(self) -> int:
        """Number of the device."""
        return self.device.index


class Event:
    """A mark in a stream."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.clock: Counter[int] = Counter()
        self.stream: Stream | None = None
        self._mark = 0

    def record(self, stream: Stream | None = None) -> None:
        """Marks the present end of a stream."""
        with self.shadow.lock:
            self.stream = stream or self.shadow.current()
            self.clock = Counter(self.stream.clock)
            self._mark = self.stream.noted

    def wait(self, stream: Stream | None = None) -> None:
        """Makes a stream wait."""
        (stream or self.shadow.current()).wait_event(self)

    def synchronize(self) -> None:
        """Waits on the host; what another thread does with the event is not held up."""
        self.shadow.delay()
        self.shadow.note_event_sync()
        if self.stream is None:
            return
        with self.shadow.lock:
            self.stream.reach(self._mark)
            self.shadow.host_clock |= self.clock

    def query(self) -> bool:
        """Whether the event has come; on a shadow only after somebody has waited."""
        return self.stream is None or self.stream._visible >= self._mark

    def elapsed_time(self, other: Event) -> float:
        """There is no clock."""
        return 0.0


class Allocation:
    """Device memory: whose it is, who wrote it last, who has read it since."""

    def __init__(self, shadow: Shadow, device: int, nbytes: int, where: str) -> None:
        self.nbytes = 0
        shadow.grow(device, nbytes)
        self.shadow = shadow
        self.device = device
        self.nbytes = nbytes
        self.where = where
        self.stream = shadow.current(device)
        self.writer: tuple[Stream, int] | None = None
        self.readers: dict[int, tuple[Stream, int]] = {}
        self.recorded: set[int] = set()

    def touched(self, stream: Stream, position: int, *, written: bool) -> None:
        """Notes an access, after checking that the stream has waited for those before."""
        if self.writer is not None:
            writer, at = self.writer
            if stream.clock[id(writer)] < at:
                raise RaceError(
                    f"{self.shadow.line()}: touches what another stream wrote ({self.where}), without waiting"
                )
        if not written:
            self.readers[id(stream)] = stream, position
            return
        for reader, at in self.readers.values():
            if stream.clock[id(reader)] < at:
                raise RaceError(
                    f"{self.shadow.line()}: overwrites what another stream may still read ({self.where})"
                )
        self.writer, self.readers = (stream, position), {}

    def __del__(self) -> None:
        if not self.nbytes:
            return  # it was refused
        with self.shadow.lock:
            self.shadow.grow(self.device, -self.nbytes)
            # The allocator gives freed memory to the next who asks on the stream it was made on.
            seen = self.stream.clock | self.shadow.host_clock
            uses = [*self.readers.values(), *([self.writer] if self.writer is not None else [])]
            for stream, position in uses:
                known = id(stream) in self.recorded or seen[id(stream)] >= position
                if stream is not self.stream and not known:
                    self.shadow.faults.append(
                        RaceError(
                            f"memory made at {self.where} was freed while another stream may still use it, "
                            "without record_stream"
                        )
                    )
                    return


def checksum(tensor: Any) -> int:
    """Returns a checksum of a tensor's bytes."""
    import zlib

    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
