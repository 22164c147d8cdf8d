"""Builds and loads the device guard that shadow tensors need, outside the source tree."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("guard.cpp")


class GuardError(RuntimeError):
    """The guard cannot be built or loaded here."""


@functools.cache
def load() -> None:
    """Builds the guard if this machine has not built it before, and loads it.

    Raises:
        GuardError: there is no C++ compiler, or it fails.
    """
    if torch.version.cuda is not None:
        raise GuardError("this torch has CUDA: its own guard is in the place of the shadow's")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise GuardError("no C++ compiler builds the shadow GPU's guard")
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dirmerge-shadow-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise GuardError(f"{folder} belongs to somebody else")
    library = folder / f"guard-{key}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "guard.so"
            flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root}/include"]
            command = [compiler, *flags, str(_SOURCE), "-o", str(made), f"-L{root}/lib", "-lc10"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise GuardError(f"{compiler} does not build the shadow GPU's guard: {done.stderr[-2000:]}")
            made.replace(library)  # at once, whoever else builds it
    torch.ops.load_library(str(library))
