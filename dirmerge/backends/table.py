"""Which implementation an op runs: the table behind dirmerge.ops, and the way to force one.

Every op has a torch implementation, right on every device and for every floating dtype. Faster ones are
listed here with the devices and dtypes they take, and the first of PREFERENCE that takes the input runs.
`with backend("native"):` forces one; where it is missing the op raises and says why.

Environment variables, all of them read at installation and none at run time but Triton's own:

| variable | values | meaning |
|---|---|---|
| DIRMERGE_NATIVE | auto (default), require, off | build the C++ library if possible, or fail, or leave it |
| DIRMERGE_CUDA | auto (default), require, off | the same for the CUDA library; needs nvcc, and no GPU |
| TRITON_INTERPRET | 0 (default), 1 | `backend("triton")` takes CPU tensors, interpreted: for tests |
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

from dirmerge.backends import cuda

PREFERENCE = ("native", "triton", "torch")
"""The order in which `auto` looks for an implementation."""

# XᵀX is work for tensor cores, which Triton's kernel uses and the CUDA C++ one does not.
_PREFERENCE_OF = {"gram": ("triton", "native", "torch")}

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""The dtypes that every op takes."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op, and the inputs it takes; None means any."""

    function: Callable[..., Any]
    devices: frozenset[str] | None
    dtypes: frozenset[torch.dtype] | None


# Under one backend an op may have several, for different devices: "native" is C++ on a CPU, CUDA C++ on CUDA.
_implementations: dict[tuple[str, str], list[Implementation]] = {}
_forced: contextvars.ContextVar[str] = contextvars.ContextVar("dirmerge_backend", default="auto")


def _load_native() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("dirmerge._C") is None:
        return None, (
            "the native library is not built: install a C++17 compiler, then reinstall dirmerge with "
            "DIRMERGE_NATIVE=require to see what is missing"
        )
    try:
        return importlib.import_module("dirmerge._C"), ""
    except ImportError as error:
        return None, f"the native library does not load, reinstall dirmerge: {error}"


_native, _native_missing = _load_native()


def native() -> Any:
    """Returns the native library dirmerge._C; the table selects native kernels only where it is built.

    Raises:
        RuntimeError: it is not built.
    """
    if _native is None:
        raise RuntimeError(_native_missing)
    return _native


@functools.cache
def triton_missing() -> str:
    """Returns why Triton kernels cannot run at all on this machine; empty if they can."""
    # A folder of that name would be found as a namespace: only a package has an origin.
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed: pip install dirmerge[triton]"
    if importlib.util.find_spec("dirmerge.triton_kernels") is None:
        return "the Triton kernels are not installed: reinstall dirmerge"
    return ""


def _interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which is slow and right and takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def native_build_info() -> dict[str, str] | str:
    """Returns compiler, flags, version and instruction set of dirmerge._C, or why it is missing."""
    if _native is None:
        return _native_missing
    info: dict[str, str] = _native.build_info()
    return info


def implements(
    op: str,
    backend: str,
    *,
    devices: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> Callable[[F], F]:
    """Enters the decorated function into the table as the implementation of op under backend.

    Args:
        op: name of the op.
        backend: one of PREFERENCE.
        devices: device types it takes; None for any.
        dtypes: dtypes it takes; None for any floating dtype.

    Returns:
        A decorator that returns its function unchanged.
    """

    def register(function: F) -> F:
        found = Implementation(
            function,
            None if devices is None else frozenset(devices),
            None if dtypes is None else frozenset(dtypes),
        )
        _implementations.setdefault((op, backend), []).append(found)
        return function

    return register


def preference(op: str) -> tuple[str, ...]:
    """Returns the order in which `auto` looks for an implementation of op."""
    return _PREFERENCE_OF.get(op, PREFERENCE)


def ops() -> list[str]:
    """Returns the names of the ops in the table, sorted; importing dirmerge.ops fills it."""
    return sorted({op for op, _ in _implementations})


def implementations(op: str, device: str) -> dict[str, Implementation]:
    """Returns the implementations of op for a device by backend, whether they can run here or not."""
    return {
        name: found
        for (of, name), all_found in _implementations.items()
        if of == op
        for found in all_found
        if found.devices is None or device in found.devices
    }


def find(
    op: str, name: str, device: str, dtype: torch.dtype, forced: str
) -> tuple[Implementation | None, str]:
    """Returns what runs op under the named backend, or None and the reason.

    Args:
        op: name of the op.
        name: one of PREFERENCE.
        device: type of the device.
        dtype: dtype of the input.
        forced: the backend in force, "auto" for none.
    """
    all_found = _implementations.get((op, name))
    if not all_found:
        return None, f"{op} has no {name} kernel"
    # The interpreter is for tests: it has to be asked for, by the environment and by backend("triton").
    interpreted = name == "triton" and forced == "triton" and device == "cpu" and _interpreted()
    fitting = [f for f in all_found if f.devices is None or device in f.devices or interpreted]
    if not fitting:
        devices = sorted({device for found in all_found for device in found.devices or ()})
        return None, f"the {name} kernel of {op} runs on {', '.join(devices)}, not on {device}"
    found = fitting[0]
    if found.dtypes is not None and dtype not in found.dtypes:
        taken = ", ".join(sorted(str(d).removeprefix("torch.") for d in found.dtypes))
        return None, f"the {name} kernel of {op} takes {taken}, not {str(dtype).removeprefix('torch.')}"
    missing = ""
    if name == "native":
        missing = cuda.missing() if device == "cuda" else _native_missing
    elif name == "triton":
        missing = triton_missing()
    return (None, missing) if missing else (found, "")


@functools.cache
def _select(op: str, forced: str, device: str, dtype: torch.dtype) -> Callable[..., Any]:
    for name in preference(op) if forced == "auto" else (forced,):
        found, reason = find(op, name, device, dtype, forced)
        if found is not None:
            return found.function
    raise RuntimeError(f'backend("{forced}") was asked for, but {reason}')


def select(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """Returns the implementation of op for a device and dtype under the backend in force.

    Raises:
        RuntimeError: a backend is forced that does not have the op for this device and dtype.
    """
    return _select(op, _forced.get(), device.type, dtype)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every op of the block under one backend: "auto", "torch", "native" or "triton".

    A forced backend never falls back: an op that it lacks raises RuntimeError with the reason. The choice
    holds for the current thread or asyncio task.

    Raises:
        ValueError: name is unknown.
    """
    if name not in ("auto", *PREFERENCE):
        raise ValueError(f"backend must be one of {', '.join(('auto', *PREFERENCE))}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
