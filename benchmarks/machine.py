"""What a number was measured on: the machine in words, its copy bandwidth and its GEMM rates."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dirmerge import __version__, backends

GEMM_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Clock = Callable[[], float]


def synchronised() -> float:
    """The wall time once the GPU has finished what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def cpu_name() -> str:
    """Returns the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def describe(device: str) -> dict[str, Any]:
    """Returns names, versions and thread count: what two runs must share to be compared."""
    native = backends.native_build_info()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "dirmerge": __version__,
        "native": native if isinstance(native, str) else f"{native['compiler']}, {native['runs_on']}",
    }


def line(machine: dict[str, Any]) -> str:
    """Returns one sentence about a machine."""
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    threads = "thread" if machine["threads"] == 1 else "threads"
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['threads']} {threads}; torch "
        f"{machine['torch']}, dirmerge {machine['dirmerge']}, native library: {machine['native']}"
    )


def _best(call: Callable[[], object], clock: Clock, seconds: float = 0.5) -> float:
    """Seconds of the fastest call of about half a second of them."""
    call()
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = clock()
        call()
        elapsed = clock() - start
        best, spent = min(best, elapsed), spent + max(elapsed, 1e-6)
    return best


def peaks(device: str, clock: Clock, dtypes: tuple[torch.dtype, ...] = GEMM_DTYPES) -> dict[str, float]:
    """Measures this machine at the thread count in force: bytes/s of a copy, FLOP/s of a GEMM per dtype.

    The copy reads and writes 256 MB each, more than any cache holds; the GEMM has 1024 rows, 8192 on a GPU.
    """
    # Zeros would let a processor that knows them cheat.
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / _best(partial(target.copy_, source), clock)}
    del source, target
    size = 8192 if device == "cuda" else 1024
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = _best(partial(torch.matmul, a, a), clock)
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return found


def measured_peaks(device: str, clock: Clock) -> dict[str, dict[str, float]]:
    """Measures the peaks at one thread and at the thread count in force; on a GPU threads do not count."""
    threads = torch.get_num_threads()
    found = {str(threads): peaks(device, clock)}
    if device == "cpu" and threads > 1:
        torch.set_num_threads(1)
        try:
            found["1"] = peaks(device, clock)
        finally:
            torch.set_num_threads(threads)
    return found
