"""What this machine and this installation have, and how to get what is missing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REQUIRED = ("torch", "numpy", "blake3", "pydantic", "PyYAML", "huggingface_hub", "typer", "rich")
DEMO = ("transformers", "peft", "matplotlib", "safetensors")


@dataclass(frozen=True)
class Row:
    """What an op runs for a device and dtype, and why nothing faster."""

    op: str
    device: str
    dtype: torch.dtype
    implementation: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The findings.

    Attributes:
        versions: package → version, None when it is not installed.
        native: build information of the native library, or why it is missing.
        cuda: the same of the CUDA library.
        backends: (op, device, dtype, implementation, why not a faster one).
        threads: torch's threads.
        compute: what `--device auto` would choose, and why (Compute.to_dict()).
        host: processors of the machine and those this process may use, bytes of memory in all and available;
            None where the system does not tell.
        gpus: per GPU its device, name, compute capability, and bytes of memory in all and free; `error`
            instead of the memory where the driver does not tell.
        advice: what is missing and how to get it; empty when all is there.
    """

    versions: dict[str, str | None]
    native: dict[str, str] | str
    cuda: dict[str, str] | str
    backends: list[tuple[str, str, str, str, str]]
    threads: int
    compute: dict[str, Any]
    host: dict[str, int | None]
    gpus: list[dict[str, Any]]
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        keys = ("op", "device", "dtype", "implementation", "reason")
        return {
            "versions": self.versions,
            "native": self.native,
            "cuda": self.cuda,
            "backends": [dict(zip(keys, row, strict=True)) for row in self.backends],
            "threads": self.threads,
            "compute": self.compute,
            "host": self.host,
            "gpus": self.gpus,
            "advice": self.advice,
        }


def examine() -> Report:
    """Look at the installation; imports torch."""
    import torch

    from dirmerge import __version__
    from dirmerge.backends import cuda, native_build_info
    from dirmerge.engine.compute import Compute

    versions: dict[str, str | None] = {"dirmerge": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*REQUIRED, *DEMO)}
    native = native_build_info()
    rows = [
        (row.op, row.device, str(row.dtype).removeprefix("torch."), row.implementation, row.reason)
        for row in table()
    ]
    advice = []
    if isinstance(native, str):
        advice.append(f"without native kernels everything works and some steps are slower: {native}")
    if torch.cuda.is_available():
        if cuda.missing():
            advice.append(f"without CUDA C++ kernels Triton and torch serve the GPU: {cuda.missing()}")
    else:
        advice.append(f"{_why_no_gpu()}: everything runs on the CPU")
    missing = [name for name in DEMO if versions[name] is None]
    if missing:
        advice.append(
            f"{', '.join(missing)} missing, which only the demo needs: pip install 'dirmerge[demo]'"
        )
    return Report(
        versions=versions,
        native=native,
        cuda=cuda.build_info(),
        backends=rows,
        threads=torch.get_num_threads(),
        compute=Compute.resolve().to_dict(),
        host=_host(),
        gpus=_gpus(),
        advice=advice,
    )


def table() -> list[Row]:
    """Returns what every op runs under "auto", for each device of this machine and each dtype."""
    import torch

    import dirmerge.ops  # noqa: F401  its modules fill the table
    from dirmerge.backends.table import FLOATING, find, ops, preference

    rows = []
    for op in ops():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            for dtype in FLOATING:
                reasons: list[str] = []
                for name in preference(op):
                    if name == "triton" and device == "cpu":
                        # No CPU is slower for want of it.
                        continue
                    found, reason = find(op, name, device, dtype, "auto")
                    if found is not None:
                        rows.append(Row(op, device, dtype, name, "; ".join(reasons)))
                        break
                    reasons.append(reason)
    return rows


def _host() -> dict[str, int | None]:
    """Returns processors and memory of the machine."""
    memory: dict[str, int] = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            pairs = (line.partition(":")[::2] for line in file)
            memory = {key: int(rest.split()[0]) * 1024 for key, rest in pairs if rest.strip().endswith("kB")}
    except (OSError, ValueError):
        pass  # another system: unknown
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processors": os.cpu_count(),
        "usable_processors": usable,
        "memory": memory.get("MemTotal"),
        "available_memory": memory.get("MemAvailable"),
    }


def _gpus() -> list[dict[str, Any]]:
    """Returns what is known of every GPU that is visible."""
    import torch

    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        found.append({"device": f"cuda:{number}", "name": name, "capability": f"{major}.{minor}"})
        try:
            free, total = torch.cuda.mem_get_info(number)
            found[-1] |= {"free_memory": free, "memory": total}
        except RuntimeError as error:
            found[-1]["error"] = str(error).partition("\n")[0]
    return found


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"torch sees no GPU, with CUDA_VISIBLE_DEVICES={visible!r}"
    return "torch sees no GPU; nvidia-smi tells whether the driver does"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
