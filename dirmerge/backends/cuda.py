"""The CUDA C++ kernels: the library of csrc/cuda, loaded by ctypes, and one call per kernel on torch tensors.

The library is plain C (addresses, sizes, strides, a stream), has the CUDA runtime inside and loads without a
driver. Its functions return a CUDA error code, which becomes a RuntimeError here; nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dirmerge.backends import nvrtc
from dirmerge.backends.launch import by_task, elect_operands, flattened, gram_operands

_PACKAGE = Path(__file__).parents[1]

LIBRARY = _PACKAGE / "libdirmerge_cuda.so"
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

    def unusable(self) -> str:
        """Returns why this machine's driver or GPU cannot run the kernels; empty if they can."""
        code: int = self._library.dirmerge_cuda_status()
        reason: bytes = self._library.dirmerge_cuda_error(code)
        return reason.decode() if code else ""

    def size(self, function: str, *arguments: int) -> int:
        """Returns what dirmerge_<function>(*arguments), a function of sizes alone, says."""
        found = getattr(self._library, f"dirmerge_{function}")
        found.restype = ctypes.c_int64
        size: int = found(*map(ctypes.c_int64, arguments))
        return size

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
def _load() -> tuple[Library | nvrtc.Library | None, str]:
    found, reason = _load_compiled()
    if found is not None or not torch.cuda.is_available():
        return found, reason
    by_nvrtc, without = nvrtc.load(str(sources()))
    return by_nvrtc, f"{reason}; {without}" if without else ""


def _load_compiled() -> tuple[Library | None, str]:
    if not LIBRARY.exists():
        return None, (
            "the CUDA library is not built: install the CUDA toolkit or the wheel nvidia-cuda-nvcc, then "
            "reinstall dirmerge with DIRMERGE_CUDA=require to see what is missing"
        )
    try:
        found = Library(LIBRARY)
    except OSError as error:
        return None, f"the CUDA library does not load, reinstall dirmerge: {error}"
    unusable = found.unusable() if torch.cuda.is_available() else ""
    if unusable:
        return None, f"the CUDA library ({found.build_info()['compiler']}) does not run here: {unusable}"
    return found, ""


def missing() -> str:
    """Returns why the CUDA C++ kernels cannot run on this installation; empty if they can."""
    return _load()[1]


def library() -> Library | nvrtc.Library:
    """Returns the library of this installation, or without one that runs here the kernels by NVRTC.

    Raises:
        RuntimeError: there is neither.
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
    for folder in (_PACKAGE / "cuda_sources", _PACKAGE.parent / "csrc" / "cuda"):
        if (folder / "simt.h").exists():
            return folder
    raise RuntimeError("the CUDA sources are not installed: reinstall dirmerge")


def _workspace(device: torch.device, op: str, *sizes: int) -> torch.Tensor:
    """The memory that the kernels of op work in."""
    return torch.empty(library().size(f"{op}_workspace", *sizes), dtype=torch.uint8, device=device)


def etf_project(core: torch.Tensor) -> torch.Tensor:
    """Launches K/(K − 1) · (Z − 1 1ᵀ Z / K); the core is read by its strides."""
    result = torch.empty_like(core, memory_format=torch.contiguous_format)
    z = flattened(core)
    library().call("etf_project", core.device, z, result, core.dtype, *z.shape, *z.stride())
    return result


def gram(x: torch.Tensor) -> torch.Tensor:
    """Launches xᵀx, float32, for 16-bit and float32 x, which is read by its strides."""
    batched, result = gram_operands(x)
    library().call("gram", x.device, batched, result, x.dtype, *batched.shape, *batched.stride())
    return result


def kth_largest_magnitude(x: torch.Tensor, k: int) -> torch.Tensor:
    """Launches the selection; x[t] that is not contiguous is copied first."""
    T = x.shape[0]
    result = x.new_empty(T)
    if T == 0:
        return result
    x = by_task(x)
    workspace = _workspace(x.device, "kth_largest_magnitude", T)
    library().call(
        "kth_largest_magnitude", x.device, x, k, result, workspace, x.dtype, T, x[0].numel(), x.stride(0)
    )
    return result


def elect_merge(
    x: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Launches the merge; x is copied first unless its x[t] are contiguous."""
    x, limits, factors, result = elect_operands(x, thresholds, weights)
    sizes = (x.shape[0], result.numel(), x.stride(0))
    library().call("elect_merge", x.device, x, limits, factors, result, x.dtype, *sizes)
    return result
