"""Where a merge runs: its devices, threads and memory, resolved once and handed to every stage."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dirmerge.errors import RecipeError
from dirmerge.planning import Plan, TensorPlan
from dirmerge.planning.costs import CHUNK_BYTES
from dirmerge.recipe import parse_size

CPU = torch.device("cpu")

# Bytes that may be read ahead, and bytes of results that may wait to be written, where no budget is given.
AHEAD = 240 << 20
BEHIND = 64 << 20
# Bytes of one matrix's weights that a method may look at twice without their being read twice.
KEPT = 1 << 30
# What a process holds beside its tensors on a device: the context, and the libraries' workspaces.
DEVICE_RESERVE = 1 << 30

_DEVICES = re.compile(r"cuda(:\d+)?(,cuda:\d+)*")


@dataclass(frozen=True)
class Compute:
    """Where a merge runs.

    Attributes:
        devices: on which matrices are merged and rows are made; several GPUs share the work.
        threads: of the CPU.
        memory: bytes that the process may hold in host memory, and on each device; None for no limit.
        reason: why these devices, for the summary.
    """

    devices: tuple[torch.device, ...]
    threads: int
    memory: int | None
    reason: str

    @classmethod
    def resolve(
        cls,
        device: str | torch.device | None = None,
        threads: int | None = None,
        memory: int | str | None = None,
    ) -> Compute:
        """Resolves what the user asks for against what the machine has.

        Args:
            device: `auto` (also None: the GPUs that are visible, else the CPU), `cpu`, `cuda` (the first
                GPU), or `cuda:N`, several separated by commas.
            threads: of the CPU; torch's number by default.
            memory: bytes, or a size such as `12GB`.

        Raises:
            ValueError: for a device or size that cannot be understood, or is not there.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if isinstance(memory, str):
            memory = parse_size(memory)
        if memory is not None and memory < 1:
            raise ValueError(f"memory must be at least 1 byte, got {memory}")
        devices, reason = _devices("auto" if device is None else str(device))
        return cls(devices, threads or torch.get_num_threads(), memory, reason)

    @property
    def device(self) -> torch.device:
        """The first device."""
        return self.devices[0]

    @property
    def on_cpu(self) -> bool:
        """Whether all is computed on the CPU."""
        return self.device.type == "cpu"

    @property
    def workers(self) -> int:
        """Number of threads that read, write and make rows: enough to keep a disk busy."""
        return max(4, min(16, self.threads)) if self.on_cpu else 8

    def on_first(self) -> Compute:
        """Returns the same with the first device alone, for work that is not shared."""
        if len(self.devices) == 1:
            return self
        reason = f"the first of {len(self.devices)} GPUs; {self.reason}"
        return replace(self, devices=self.devices[:1], reason=reason)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON)."""
        return {
            "devices": [device_name(device) for device in self.devices],
            "reason": self.reason,
            "threads": self.threads,
            "memory": self.memory,
        }

    @contextmanager
    def scoped_threads(self) -> Iterator[None]:
        """Computes with `threads` threads in the calling thread, and puts its number back."""
        before = torch.get_num_threads()
        if before == self.threads:
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Budget:
    """How a merge shares its memory.

    Attributes:
        ahead: bytes read ahead of the computation.
        behind: bytes of results that wait to be written.
        waiting: bytes of updates that may wait for λ in host memory; others wait on the disk.
        kept: bytes of one matrix's weights that are kept for a method that looks at them twice.
        device_ahead: bytes copied to each device ahead of the computation.
        device_waiting: bytes of updates that may wait for λ on each device.
        device_kept: what `kept` is on each device.
    """

    ahead: int
    behind: int
    waiting: int
    kept: int
    device_ahead: int
    device_waiting: int
    device_kept: int

    @classmethod
    def of_plan(cls, compute: Compute, plan: Plan) -> Budget:
        """Shares the memory for a plan; RecipeError as `of`."""
        largest = max((_peak(plan, tensor, compute) for tensor in plan.tensors), default=0)
        return cls.of(compute, largest, CHUNK_BYTES, resident_bytes(), plan.origin)

    @classmethod
    def of(cls, compute: Compute, largest: int, smallest_ahead: int, used: int, origin: str) -> Budget:
        """Shares the memory that is allowed, or takes the defaults where no limit is given.

        Args:
            compute: with the limit.
            largest: bytes that the computation of one tensor needs at its fullest.
            smallest_ahead: bytes of the largest single read.
            used: bytes that the process holds already.
            origin: of the recipe, for messages.

        Raises:
            RecipeError: the limit is too small; says which is the smallest that is enough.
        """
        on_cpu = compute.on_cpu
        free = 0 if on_cpu else _free(compute.device)
        if compute.memory is None:
            quarter = max(0, free - DEVICE_RESERVE - largest - BEHIND) // 4
            return cls(AHEAD, BEHIND, 0, KEPT, quarter, quarter, quarter)
        work = largest if on_cpu else 0
        least = used + work + 2 * smallest_ahead
        least_device = 0 if on_cpu else largest + 2 * smallest_ahead
        if compute.memory < max(least, least_device):
            raise RecipeError(
                f"{origin}: a memory of {compute.memory} bytes is too small: this merge needs at least "
                f"{max(least, least_device)} ({used} of the process itself, {largest} for its largest "
                f"tensor, {2 * smallest_ahead} to read and write)"
            )
        spare = compute.memory - used - work
        ahead = max(smallest_ahead, min(spare // 2, 6 * AHEAD))
        behind = max(smallest_ahead, min(spare // 4, 8 * BEHIND))
        # On a device also the rows in the making and the results on their way back take their share.
        behind = behind if on_cpu else min(behind, (compute.memory - largest) // 4)
        quarter = 0 if on_cpu else max(0, min(compute.memory, free) - largest - behind) // 4
        half = max(0, spare - ahead - behind) // 2
        return cls(ahead, behind, half, half, quarter, quarter, quarter)

    def waiting_on(self, devices: Sequence[torch.device]) -> dict[torch.device, int]:
        """Returns the bytes of updates that may wait on each device and in the host's memory."""
        return {CPU: self.waiting} | {d: self.device_waiting for d in devices if d.type != "cpu"}


def _peak(plan: Plan, tensor: TensorPlan, compute: Compute) -> int:
    """Returns what a tensor needs at its fullest; a GPU selects thresholds in a difference that it forms."""
    form = plan.method.rows
    by_rows = form is not None and form.threshold is not None and tensor.rule == "merge"
    return tensor.peak_bytes + (12 * tensor.numel if by_rows and not compute.on_cpu else 0)


def device_name(device: torch.device) -> str:
    """Returns what a device is called in the summary: with the card's name for a GPU."""
    if device.type == "cpu":
        return "cpu"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def resident_bytes() -> int:
    """Returns the memory that the process holds now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _devices(text: str) -> tuple[tuple[torch.device, ...], str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        if not count:
            return (CPU,), "no GPU is visible"
        return tuple(torch.device("cuda", n) for n in range(count)), "auto: every GPU that is visible"
    if text == "cpu":
        return (CPU,), "asked for"
    if not _DEVICES.fullmatch(text):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N[,cuda:M], got {text!r}")
    if not count:
        raise ValueError(f"device {text!r} was asked for, but torch sees no CUDA device")
    numbers = [int(part.partition(":")[2] or 0) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"device names a GPU twice: {text!r}")
    missing = [number for number in numbers if number >= count]
    if missing:
        raise ValueError(f"device names cuda:{missing[0]}, but there are {count} GPUs")
    return tuple(torch.device("cuda", number) for number in numbers), "asked for"


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])
