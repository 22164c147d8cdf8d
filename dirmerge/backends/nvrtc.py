"""The CUDA C++ kernels without the compiled library: NVRTC compiles csrc/cuda/<op>.cuh on first use, by CuPy.

`Library` is called like dirmerge.backends.cuda.Library, and does what the launchers csrc/cuda/<op>.cu do: it
chooses the instantiation and the grid. CuPy keeps what was compiled on disk.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAX_BLOCKS = 0x7FFFFFFF

# constexpr numbers of csrc/cuda/<op>.cuh.
SIZES = {
    "elect_merge": {"THREADS": 256},
    "etf_project": {"COLUMNS": 32, "THREADS": 256, "WHOLE_K": 128},
    "gram": {"TILE": 64, "THREADS": 128},
    "kth_largest_magnitude": {"THREADS": 512, "SELECT_THREADS": 256, "BINS": 2048, "BLOCKS": 1024},
}
DIGITS = {16: (8, 7), 32: (11, 10, 10), 64: (11, 11, 11, 10, 10, 10)}
"""Of kth_largest_magnitude."""

_ELEMENTS = {
    torch.bfloat16: "dirmerge::cuda::BFloat16",
    torch.float16: "dirmerge::cuda::Float16",
    torch.float32: "float",
    torch.float64: "double",
}
# Kernels read magnitudes as integers.
_BITS = {16: "unsigned short", 32: "dirmerge::cuda::uint32", 64: "dirmerge::cuda::uint64"}


@dataclass(frozen=True)
class Launch:
    """One kernel to be launched.

    Attributes:
        kernel: its name and template arguments, in namespace dirmerge::cuda.
        blocks: that the work consists of; more than a grid may have is no error, the kernels stride.
        threads: of a block.
        arguments: NumPy scalars of the parameters' widths, addresses as uintp.
    """

    kernel: str
    blocks: int
    threads: int
    arguments: tuple[Any, ...]


def _address(value: torch.Tensor | int | None) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    return np.uintp(value or 0)


def _int64(*values: int) -> tuple[Any, ...]:
    return tuple(np.int64(value) for value in values)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _aligned(x: torch.Tensor, *strides: int) -> bool:
    """Whether a base address and strides in elements let every row start at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in strides)


def _etf_project(
    core: torch.Tensor, result: torch.Tensor, dtype: torch.dtype, batch: int, K: int, n: int, *strides: int
) -> Iterator[Launch]:
    sizes = SIZES["etf_project"]
    whole = "true" if sizes["WHOLE_K"] >= K else "false"
    compute = np.float64 if dtype == torch.float64 else np.float32
    arguments = (
        _address(core),
        _address(result),
        *_int64(batch, K, n, *strides),
        compute(K / (K - 1) if K > 1 else np.inf),
    )
    blocks = batch * _ceil_div(n, sizes["COLUMNS"])
    yield Launch(f"etf_project_kernel<{_ELEMENTS[dtype]}, {whole}>", blocks, sizes["THREADS"], arguments)


def _gram(
    x: torch.Tensor, result: torch.Tensor, dtype: torch.dtype, batch: int, m: int, n: int, *strides: int
) -> Iterator[Launch]:
    across = _ceil_div(n, SIZES["gram"]["TILE"])
    arguments = (_address(x), _address(result), *_int64(batch, m, n, *strides))
    blocks = batch * across * (across + 1) // 2
    yield Launch(f"gram_kernel<{_ELEMENTS[dtype]}>", blocks, SIZES["gram"]["THREADS"], arguments)


def _elect_merge(
    x: torch.Tensor,
    thresholds: torch.Tensor | None,
    weights: torch.Tensor | None,
    result: torch.Tensor,
    dtype: torch.dtype,
    tasks: int,
    count: int,
    stride_t: int,
) -> Iterator[Launch]:
    wide = _aligned(x, stride_t) and _aligned(result, count)
    width = min(4, 16 // x.itemsize) if wide else 1
    threads = SIZES["elect_merge"]["THREADS"]
    arguments = (
        *map(_address, (x, thresholds, weights, result)),
        *_int64(tasks, count, stride_t),
    )
    blocks = _ceil_div(count, threads * width)
    yield Launch(f"elect_merge_kernel<{_ELEMENTS[dtype]}, {width}>", blocks, threads, arguments)


def _kth_largest_magnitude(
    x: torch.Tensor,
    k: int,
    result: torch.Tensor,
    workspace: torch.Tensor,
    dtype: torch.dtype,
    tasks: int,
    size: int,
    stride_t: int,
) -> Iterator[Launch]:
    sizes = SIZES["kth_largest_magnitude"]
    bits = 8 * dtype.itemsize
    width = 16 // dtype.itemsize if _aligned(x, stride_t, size) else 1
    shares = min(_ceil_div(size, sizes["THREADS"] * width), _ceil_div(sizes["BLOCKS"], max(tasks, 1)))
    # The states of the tasks, two 64-bit numbers each, come before the counts.
    states, counts = _address(workspace), _address(workspace.data_ptr() + 16 * tasks)
    threads, select_threads = sizes["THREADS"], sizes["SELECT_THREADS"]
    start = (states, counts, np.int64(tasks), np.uint64(k))
    yield Launch("kth_start_kernel", tasks, select_threads, start)
    shift = bits - 1
    for digit in DIGITS[bits]:
        shift -= digit
        histogram = (
            _address(x),
            states,
            counts,
            *_int64(tasks, size, stride_t, shares),
            np.int32(shift),
            np.int32(digit),
        )
        yield Launch(f"kth_histogram_kernel<{_BITS[bits]}, {width}>", tasks * shares, threads, histogram)
        select = (
            states,
            counts,
            _address(result),
            np.int64(tasks),
            np.int32(digit),
            np.bool_(shift == 0),
        )
        yield Launch(f"kth_select_kernel<{_BITS[bits]}>", tasks, select_threads, select)


LAUNCHES: dict[str, Callable[..., Iterator[Launch]]] = {
    "elect_merge": _elect_merge,
    "etf_project": _etf_project,
    "gram": _gram,
    "kth_largest_magnitude": _kth_largest_magnitude,
}
"""What each launcher csrc/cuda/<op>.cu launches, from the arguments that dirmerge.backends.cuda passes."""


WORKSPACES: dict[str, Callable[..., int]] = {
    "kth_largest_magnitude_workspace": lambda tasks: (
        tasks * (16 + 8 * SIZES["kth_largest_magnitude"]["BINS"])
    ),
}
"""The functions of sizes dirmerge_<op>_workspace."""


class _Stream:
    """A CUDA stream by its address, for the protocol that CuPy takes streams of others by."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


class Library:
    """The kernels, compiled by NVRTC and launched by CuPy on addresses.

    Args:
        cupy: the module cupy.
        folder: of the .cuh files.
    """

    def __init__(self, cupy: Any, folder: str) -> None:
        self._cupy = cupy
        self._options = ("--std=c++17", f"-I{folder}")
        # CuPy's cache on disk knows the text it compiles, not what that includes.
        files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".cuh", ".h"))
        self._digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
        self._kernel = functools.cache(self._compile)

    def build_info(self) -> dict[str, str]:
        """Returns the compiler and when it works."""
        major, minor = self._cupy.cuda.nvrtc.getVersion()
        return {
            "compiler": f"NVRTC {major}.{minor} by CuPy {self._cupy.__version__}",
            "built_for": "this GPU, on first use",
        }

    def size(self, function: str, *arguments: int) -> int:
        """Returns what the function of sizes dirmerge_<function> of csrc/cuda returns."""
        return WORKSPACES[function](*arguments)

    def call(self, op: str, device: torch.device, *arguments: object) -> None:
        """Launches op on the device and its current stream; see dirmerge.backends.cuda.Library.call.

        Raises:
            RuntimeError: NVRTC or the launch failed; names the op and the reason.
        """
        address = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        launches = LAUNCHES[op](*arguments)
        with (
            self._cupy.cuda.Device(device.index or 0),
            self._cupy.cuda.Stream.from_external(_Stream(address)),
        ):
            for launch in launches:
                if launch.blocks == 0:
                    continue
                try:
                    kernel = self._kernel(op, launch.kernel)
                    kernel((min(launch.blocks, MAX_BLOCKS),), (launch.threads,), launch.arguments)
                except (RuntimeError, self._cupy.cuda.compiler.CompileException) as error:
                    raise RuntimeError(f"{op}: the CUDA kernel was not launched: {error}") from error

    def _compile(self, op: str, kernel: str) -> Any:
        name = f"dirmerge::cuda::{kernel}"
        module = self._cupy.RawModule(
            code=f'// {self._digest}\n#include "{op}.cuh"\n',
            options=self._options,
            name_expressions=(name,),
        )
        return module.get_function(name)


def load(folder: str) -> tuple[Library | None, str]:
    """Returns the kernels of a folder by CuPy's NVRTC, or None and why not."""
    if importlib.util.find_spec("cupy") is None:
        return None, "NVRTC could compile the kernels by CuPy: pip install dirmerge[cupy]"
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.nvrtc.getVersion()
        cupy.cuda.runtime.getDeviceCount()
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"CuPy does not work here: {error}"
    return Library(cupy, folder), ""
