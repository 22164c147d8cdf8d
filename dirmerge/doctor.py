"""What this installation has: versions, native library, backends, and how to get what is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REQUIRED = ("torch", "numpy", "pydantic", "PyYAML", "huggingface_hub", "typer", "rich")
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
        advice: what is missing and how to get it; empty when all is there.
    """

    versions: dict[str, str | None]
    native: dict[str, str] | str
    cuda: dict[str, str] | str
    backends: list[tuple[str, str, str, str, str]]
    threads: int
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
            "advice": self.advice,
        }


def examine() -> Report:
    """Look at the installation; imports torch."""
    import torch

    from dirmerge import __version__
    from dirmerge.backends import cuda, native_build_info

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
        advice.append("no CUDA device is visible to torch: everything runs on the CPU")
    missing = [name for name in DEMO if versions[name] is None]
    if missing:
        advice.append(
            f"{', '.join(missing)} missing, which only the demo needs: pip install 'dirmerge[demo]'"
        )
    return Report(versions, native, cuda.build_info(), rows, torch.get_num_threads(), advice)


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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
