"""Every form of the kernels on the CPU, against float64 and beside torch: JSON on stdout.

    TRITON_INTERPRET=1 python -m benchmarks.numerics triton     in Triton's interpreter
    python -m benchmarks.numerics cuda                          CUDA C++, emulated: tests/emulation.py

Processes of their own, started by benchmarks.kernels: Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

import dirmerge.ops  # noqa: F401  registers the ops
from benchmarks import cuda_kernels
from benchmarks.kernels import FORMS, ROOT, Form
from dirmerge import backends
from dirmerge.backends import cuda
from dirmerge.ops._registration import compute_dtype

# Truth for float64 is torch's own float64, so the error of a float64 form has that of the truth in it.
FLOAT64_FLOOR = 1e-13
# The interpreter takes milliseconds a tile: three tiles of 32 along each side, two of 64 of which one is cut.
SIZE = 96


def in_double(value: Any) -> Any:
    """Tensors in float64, inside lists too; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return [in_double(one) for one in value] if isinstance(value, list) else value


def comparable(op: str, result: Any) -> list[torch.Tensor]:
    """What of an op's result can be compared entry by entry with another computation's."""
    outputs = list(result) if isinstance(result, tuple) else [result]
    if op == "rotation_step":
        # The deviation from orthogonality is rounding alone.
        return outputs[:1]
    return outputs


def accuracy(form: Form, launcher: Callable[..., Any]) -> dict[str, Any]:
    """Runs one form, torch's default in the same dtype, and torch's default in float64: the truth."""
    args, kwargs = form.arguments(SIZE)
    op = getattr(torch.ops.dirmerge, form.op).default
    found = launcher(*args, **kwargs)
    with backends.backend("torch"):
        expected = op(*args, **kwargs)
        truth = op(*map(in_double, args), **kwargs)
    error = by_torch = 0.0
    for one, other, true in zip(*(comparable(form.op, x) for x in (found, expected, truth)), strict=True):
        if one.dtype != other.dtype or one.shape != other.shape:
            sys.exit(f"{form.op} ({form.name}) returns {one.dtype} {tuple(one.shape)}")
        size = float(true.double().abs().max()) or 1.0
        error = max(error, float((one.double() - true).abs().max()) / size)
        by_torch = max(by_torch, float((other.double() - true).abs().max()) / size)
    is_double = compute_dtype(args[0]) == torch.float64
    floor = FLOAT64_FLOOR if is_double else torch.finfo(torch.float32).eps / 2
    return {"op": form.op, "form": form.name, "error": error, "by_torch": by_torch, "floor": floor}


def _triton() -> list[dict[str, Any]]:
    if not triton.knobs.runtime.interpret:
        sys.exit("run this under TRITON_INTERPRET=1: without a GPU nothing else runs the kernels")

    def launcher(op: str) -> Callable[..., Any]:
        module = __import__(f"dirmerge.triton_kernels.{op}", fromlist=[op])
        found: Callable[..., Any] = getattr(module, op)
        return found

    return [accuracy(form, launcher(form.op)) for form in FORMS]


def _cuda() -> list[dict[str, Any]]:
    sys.path.append(str(ROOT / "tests"))
    from emulation import CSRC, Emulated, compile_emulated

    forms = [form for form in FORMS if form.op in cuda_kernels.OPS]
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        library = Emulated(compile_emulated(CSRC, sources, Path(folder))).library
        # The launchers ask for the library of the installation.
        cuda.library = lambda: library
        return [accuracy(form, getattr(cuda, form.op)) for form in forms]


def main() -> None:
    """Prints one JSON object per form, in a list."""
    kinds = {"triton": _triton, "cuda": _cuda}
    if len(sys.argv) != 2 or sys.argv[1] not in kinds:
        sys.exit(f"say whose kernels: python -m benchmarks.numerics {' | '.join(kinds)}")
    print(json.dumps(kinds[sys.argv[1]]()))


if __name__ == "__main__":
    main()
