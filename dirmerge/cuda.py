"""The CUDA C++ kernels: the library of csrc/cuda, loaded by ctypes, and one call per kernel on torch tensors.

The library is plain C (addresses, sizes, strides, a stream), has the CUDA runtime inside and loads without a
driver. Its functions return a CUDA error code, which becomes a RuntimeError here; nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("libdirmerge_cuda.so")
"""Where the installation puts the library, if it builds it."""

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
"""The numbers of csrc/cuda/launch.h."""


class Library:
    """A loaded library of csrc/cuda: compiled by nvcc, or for tests by a C++ compiler (csrc/cuda/simt.h).

    Args:
        path: the shared library.

    Raises:
        OSError: it does not load.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.dirmerge_cuda_build_info.restype = ctypes.c_char_p
        self._library.dirmerge_cuda_error.restype = ctypes.c_char_p

    def build_info(self) -> dict[str, str]:
        """Returns the version, the compiler and the architectures of the library."""
        text: bytes = self._library.dirmerge_cuda_build_info()
        return dict(line.split(": ", 1) for line in text.decode().splitlines())

    def call(self, op: str, device: torch.device, *arguments: object) -> None:
        """Calls dirmerge_<op>(*arguments, stream) for the device and its current stream.

        Args:
            op: the name of the function without its prefix.
            device: where the tensors are.
            arguments: tensors and None are passed as addresses, integers as int64, floats as double,
                dtypes by number.

        Raises:
            RuntimeError: the launch failed; names the op and CUDA's reason.
        """
        with torch.cuda.device(device if device.type == "cuda" else -1):
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            code = getattr(self._library, f"dirmerge_{op}")(
                *map(_argument, arguments), ctypes.c_void_p(stream)
            )
        if code:
            reason: bytes = self._library.dirmerge_cuda_error(code)
            raise RuntimeError(f"{op}: the CUDA kernel was not launched: {reason.decode()} (error {code})")


def _argument(value: object) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int(DTYPES[value])
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)  # type: ignore[arg-type]


@functools.cache
def _load() -> tuple[Library | None, str]:
    if not LIBRARY.exists():
        return None, (
            "the CUDA library is not built: install the CUDA toolkit or the wheel nvidia-cuda-nvcc, then "
            "reinstall dirmerge with DIRMERGE_CUDA=require to see what is missing"
        )
    try:
        return Library(LIBRARY), ""
    except OSError as error:
        return None, f"the CUDA library does not load, reinstall dirmerge: {error}"


def missing() -> str:
    """Returns why the CUDA C++ kernels cannot run on this installation; empty if they can."""
    return _load()[1]


def library() -> Library:
    """Returns the library of this installation.

    Raises:
        RuntimeError: it is not built.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(reason)
    return found


def build_info() -> dict[str, str] | str:
    """Returns version, compiler and architectures of the CUDA library, or why it is missing."""
    found, reason = _load()
    return reason if found is None else found.build_info()


def sources() -> Path:
    """Returns the folder of simt.h and the <op>.cuh files, the include path that NVRTC needs.

    It is part of an installed package, and csrc/cuda of the checkout of an editable installation.

    Raises:
        RuntimeError: they are not installed.
    """
    for folder in (Path(__file__).with_name("cuda_sources"), Path(__file__).parents[1] / "csrc" / "cuda"):
        if (folder / "simt.h").exists():
            return folder
    raise RuntimeError("the CUDA sources are not installed: reinstall dirmerge")


def _batched(x: torch.Tensor) -> torch.Tensor:
    """Flattens (..., m, n) to (batch, m, n); a copy only where no one stride describes the batch."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def etf_project(core: torch.Tensor) -> torch.Tensor:
    """Launches K/(K − 1) · (Z − 1 1ᵀ Z / K); the core is read by its strides."""
    result = torch.empty_like(core, memory_format=torch.contiguous_format)
    z = _batched(core)
    library().call("etf_project", core.device, z, result, core.dtype, *z.shape, *z.stride())
    return result
