"""`Shadow`: one or more shadow GPUs in the place of torch.cuda."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from shadow import guard
from shadow.log import Launch
from shadow.streams import Event, RaceError, Stream, checksum
from shadow.tensor import dispatch

PACKAGE = "/dirmerge/"  # lines of this package are named in counts

_active: list[Shadow] = []


def active() -> Shadow:
    """Returns the shadow that is in force."""
    if not _active:
        raise RuntimeError("a shadow tensor was used outside its shadow")
    return _active[-1]


class _Mode(TorchDispatchMode):
    """Sends a thread's operations to the shadow."""

    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self._shadow = shadow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(self._shadow, func, args, kwargs or {})


class Shadow:
    """Shadow GPUs, as a context.

    Inside it torch.cuda finds `devices` GPUs, and tensors moved there compute on the CPU. Threads that start
    inside take part. Counted, by file and line of dirmerge: what makes the host wait (`syncs`), waits for
    events (`event_syncs`: a thread that feeds or writes may), copies (`copies`, `bytes_in`, `bytes_out`),
    launches (`launches`), memory (`peak_bytes`). RaceError tells of an order that streams do not guarantee:
    a tensor touched from a stream that has not waited for its writer, memory freed while another stream
    uses it, a staging buffer changed while its copy is on its way. Host memory that a copy fills without
    blocking holds 0xFF until its event or stream was waited for.

    Not seen: what one torch operation needs inside it, time, and operations of C++ extensions. An op of
    dirmerge runs its torch implementation.

    Args:
        devices: how many GPUs.
        memory: bytes of each; beyond it torch.OutOfMemoryError.
        schedule: a seed for random delays before copies and waits, which shuffle the order of the threads.
        values: False computes nothing, so that a log of any size takes seconds: tensors on a device have a
            shape alone; what is read of them is 1, True, or 0 of whole numbers. An op of dirmerge that has a
            kernel for CUDA is one launch of it.
    """

    def __init__(
        self,
        devices: int = 1,
        memory: int = 80 << 30,
        schedule: int | None = None,
        *,
        values: bool = True,
    ) -> None:
        self.devices = devices
        self.memory = memory
        self.values = values
        self.data_device = torch.device("cpu" if values else "meta")
        self.lock = threading.RLock()
        self.syncs: Counter[str] = Counter()
        self.event_syncs: Counter[str] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.launches: list[Launch] = []
        self.live = [0] * devices
        self.peak = [0] * devices
        self.host_clock: Counter[int] = Counter()
        self.faults: list[RaceError] = []
        self._random = None if schedule is None else random.Random(schedule)
        self._pinned: dict[int, int] = {}
        self._keep: list[torch.Tensor] = []
        self._local = threading.local()
        self._defaults = [Stream(self, index) for index in range(devices)]
        self._streams = list(self._defaults)
        self._undo = contextlib.ExitStack()

    @property
    def bytes_in(self) -> int:
        """Bytes copied to the devices."""
        return sum(count for (way, _), count in self.bytes.items() if way == "in")

    @property
    def bytes_out(self) -> int:
        """Bytes copied to the host."""
        return sum(count for (way, _), count in self.bytes.items() if way == "out")

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were live on one device at a time."""
        return max(self.peak)

    @property
    def largest_factorisation(self) -> int:
        """The smaller side of the largest matrix that was factorised on a device."""
        return max((launch.factorisation for launch in self.launches), default=0)

    @property
    def solver_waits(self) -> int:
        """How many factorisations torch waits for on a GPU, to see if they succeeded; not among `syncs`."""
        return sum(launch.is_checked for launch in self.launches)

    def line(self) -> str:
        """Returns file and line of dirmerge that is running."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if PACKAGE in name and "/tests/" not in name:
                return f"{name.rsplit(PACKAGE, 1)[1]}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    def note_sync(self, why: str) -> None:
        """Counts a wait of the host."""
        with self.lock:
            self.syncs[f"{self.line()} {why}"] += 1

    def note_event_sync(self) -> None:
        """Counts a wait of the host for an event."""
        with self.lock:
            self.event_syncs[self.line()] += 1

    def note_copy(self, way: str, device: int, nbytes: int) -> None:
        """Counts a copy: `in`, `out`, or `peer` between devices."""
        self.copies[way, self.line()] += 1
        self.bytes[way, device] += nbytes

    def delay(self) -> None:
        """Waits a little, by the schedule."""
        if self._random is not None:
            with self.lock:
                pause = self._random.random() ** 3 * 3e-3
            time.sleep(pause)

    def grow(self, device: int, nbytes: int) -> None:
        """Counts memory of a device."""
        with self.lock:
            if self.live[device] + nbytes > self.memory:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: {self.live[device]} bytes are in use on cuda:{device} of "
                    f"{self.memory}, {nbytes} more were asked for at {self.line()}"
                )
            self.live[device] += nbytes
            self.peak[device] = max(self.peak[device], self.live[device])

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Makes the memory of a tensor pinned."""
        storage = tensor.untyped_storage()
        with self.lock:
            self._pinned[storage.data_ptr()] = storage.nbytes()
            self._keep.append(tensor.detach())  # so that no other memory gets its address
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor is pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def from_host(self, stream: Stream, source: torch.Tensor, non_blocking: bool) -> None:
        """Sees to it that a staging buffer does not change until its copy has ended."""
        if not (non_blocking and self.is_pinned(source)):
            self.note_sync("copies to the device from memory that is not pinned, or blocking")
            return
        before, line = checksum(source), self.line()

        def done() -> None:
            if checksum(source) != before:
                raise RaceError(f"{line}: the staging buffer was overwritten while its copy was on its way")

        stream.later(done)

    def to_host(self, stream: Stream, target: torch.Tensor, value: torch.Tensor, non_blocking: bool) -> None:
        """Fills host memory, at once or when the stream is waited for."""
        if not (non_blocking and self.is_pinned(target)):
            self.note_sync("copies to the host into memory that is not pinned, or blocking")
            stream.reach(stream.noted)
            self.host_clock |= stream.clock
            target.copy_(value)
            return
        value = value.clone()
        with _disable_current_modes():
            target.reshape(-1).view(torch.uint8).fill_(0xFF)

        def done() -> None:
            with _disable_current_modes():
                target.copy_(value)

        stream.later(done)

    def current_device(self) -> int:
        """Returns the number of the thread's device."""
        return int(getattr(self._local, "device", 0))

    def current(self, device: int | None = None) -> Stream:
        """Returns the thread's stream on a device."""
        index = self.current_device() if device is None else device
        streams: dict[int, Stream] = getattr(self._local, "streams", {})
        return streams.get(index, self._defaults[index])

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Makes the calling thread's operations the shadow's."""
        with _Mode(self):
            yield

    def __enter__(self) -> Shadow:
        guard.load()
        self._undo.__enter__()
        for owner, name, value in self._patches():
            self._undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        _active.append(self)
        self._undo.callback(_active.pop)
        self._undo.enter_context(self.entered())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                with self.lock:
                    for stream in self._streams:
                        stream.reach(stream.noted)
        finally:
            self._undo.__exit__(kind, error, trace)
        if kind is None and self.faults:
            raise self.faults[0]

    @contextlib.contextmanager
    def _on_stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        streams = getattr(self._local, "streams", {})
        before = self._local.__dict__.get("device", 0)
        self._local.streams = {**streams, stream.device.index: stream}
        self._local.device = stream.device.index
        try:
            yield
        finally:
            self._local.streams, self._local.device = streams, before

    @contextlib.contextmanager
    def _on_device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self._local.device = self._index(device)
        try:
            yield
        finally:
            self._local.device = before

    def _set_device(self, device: Any) -> None:
        self._local.device = self._index(device)

    def _index(self, device: Any) -> int:
        if device is None:
            return self.current_device()
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current_device() if index is None else index

    def _make_stream(self, device: Any = None, priority: int = 0) -> Stream:
        with self.lock:
            self._streams.append(Stream(self, self._index(device)))
            return self._streams[-1]

    def _synchronize(self, device: Any = None) -> None:
        self.note_sync("cuda.synchronize")
        with self.lock:
            for stream in self._streams:
                if stream.device.index == self._index(device):
                    stream.reach(stream.noted)
                    self.host_clock |= stream.clock

    def _patches(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        real_run = threading.Thread.run
        shadow = self

        def run(thread: threading.Thread) -> None:
            with shadow.entered():
                shadow.delay()
                real_run(thread)

        def properties(device: Any = None) -> SimpleNamespace:
            return SimpleNamespace(name="shadow", total_memory=self.memory, major=9, minor=0)

        cuda = torch.cuda
        return [
            (threading.Thread, "run", run),
            (cuda, "_lazy_init", lambda: None),
            (cuda, "is_available", lambda: True),
            (cuda, "is_bf16_supported", lambda *_: True),
            (cuda, "device_count", lambda: self.devices),
            (cuda, "current_device", self.current_device),
            (cuda, "set_device", self._set_device),
            (cuda, "device", self._on_device),
            (cuda, "mem_get_info", lambda d=None: (self.memory - self.live[self._index(d)], self.memory)),
            (cuda, "memory_allocated", lambda d=None: self.live[self._index(d)]),
            (cuda, "max_memory_allocated", lambda d=None: self.peak[self._index(d)]),
            (cuda, "get_device_capability", lambda d=None: (9, 0)),
            (cuda, "get_device_name", lambda d=None: "shadow"),
            (cuda, "get_device_properties", properties),
            (cuda, "synchronize", self._synchronize),
            (cuda, "Stream", self._make_stream),
            (cuda, "Event", lambda *_, **__: Event(self)),
            (cuda, "stream", self._on_stream),
            (cuda, "current_stream", lambda d=None: self.current(self._index(d))),
            (cuda, "default_stream", lambda d=None: self._defaults[self._index(d)]),
            (cuda, "empty_cache", lambda: None),
        ]
