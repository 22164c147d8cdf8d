"""The implementations of the ops: which there are, which one runs, and how those for a GPU are launched.

`table` holds the implementations that dirmerge.ops enters, and `backend(...)`, which forces one. `cuda` loads
and launches the compiled CUDA C++ kernels, `nvrtc` compiles the same kernels on first use. `launch` is what
the launchers of CUDA C++ and Triton kernels share. Nothing here imports dirmerge.ops.
"""

from dirmerge.backends.table import (
    FLOATING,
    PREFERENCE,
    Implementation,
    backend,
    implementations,
    implements,
    native,
    native_build_info,
    preference,
    select,
    triton_missing,
)

__all__ = [
    "FLOATING",
    "PREFERENCE",
    "Implementation",
    "backend",
    "implementations",
    "implements",
    "native",
    "native_build_info",
    "preference",
    "select",
    "triton_missing",
]
