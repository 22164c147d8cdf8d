"""csrc/cuda compiled by a C++ compiler through csrc/cuda/simt.h, and how the library runs its threads.

DIRMERGE_SANITIZE=1 compiles with ASan and UBSan; python must then run with libasan preloaded: make sanitize.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dirmerge.backends import cuda

CSRC = Path(__file__).parents[1] / "csrc"
SANITIZE = os.environ.get("DIRMERGE_SANITIZE") == "1"
FLAGS = [
    "-std=c++20",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    *(["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []),
]
# See simt.h: warp after warp upwards, downwards, and all threads in turn by two seeds.
ORDERS = (0, 1, 2, 3)
UNLIMITED = 2**31 - 1


def compile_emulated(
    csrc: Path, sources: list[Path], folder: Path, objects: tuple[Path, ...] = (), optimisation: str = "-O1"
) -> Path:
    """Compiles .cu files with g++, two at a time, and links them, with further objects, into a library."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the CUDA kernels are emulated by a C++20 compiler, and there is no g++")
    # The compiler itself is to run without the sanitizer that is preloaded for python.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    folder.mkdir(parents=True, exist_ok=True)
    compiled = [folder / f"{source.name}.o" for source in sources]
    running: list[subprocess.Popen[str]] = []
    for source, target in zip(sources, compiled, strict=True):
        command = [
            compiler,
            *FLAGS,
            optimisation,
            f"-I{csrc}",
            "-x",
            "c++",
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        if len(running) % 2 == 0:
            running[-2].wait()
    for process in running:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    library = folder / "libemulated.so"
    linked = [str(path) for path in (*compiled, *objects)]
    subprocess.run([compiler, *FLAGS, "-shared", *linked, "-o", str(library)], check=True, env=environment)
    return library


class Emulated:
    """An emulated library, and how it runs its threads."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.library = cuda.Library(path)
        self._configure = ctypes.CDLL(str(path)).dirmerge_simt_configure

    def configure(self, order: int, max_blocks: int = UNLIMITED) -> None:
        """Sets the order of the threads, and how many blocks a grid may have; fewer stride over the work."""
        self._configure(ctypes.c_int(order), ctypes.c_int64(max_blocks))
