"""Every form of the Triton kernels in Triton's interpreter, against float64 and beside torch: JSON on stdout.

    TRITON_INTERPRET=1 python -m benchmarks.numerics

A process of its own, started by benchmarks.kernels: Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton

import dirmerge.ops  # noqa: F401  registers the ops
from benchmarks.kernels import FORMS, Form
from dirmerge import backends
from dirmerge.ops._registration import compute_dtype

# The interpreter takes milliseconds a tile: three tiles of 32 along each side, two of 64 of which one is cut.
SIZE = 96
# Of rotation_step the deviation from orthogonality, which is rounding alone, is no number to compare.
COMPARED = {"rotation_step": 1}


def in_double(value: Any) -> Any:
    """Tensors in float64, inside lists too; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.double()
    return [in_double(one) for one in value] if isinstance(value, list) else value


def accuracy(form: Form) -> dict[str, Any]:
    """Runs one form, torch's default in the same dtype, and torch's default in float64: the truth."""
    args, kwargs = form.arguments(SIZE)
    op = getattr(torch.ops.dirmerge, form.op).default
    found = form.launch(SIZE)
    with backends.backend("torch"):
        expected = op(*args, **kwargs)
        truth = op(*map(in_double, args), **kwargs)
    error = by_torch = 0.0
    outputs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected, truth)), strict=True)
    for one, other, true in list(outputs)[: COMPARED.get(form.op)]:
        if one.dtype != other.dtype or one.shape != other.shape:
            sys.exit(f"{form.op} ({form.name}) returns {one.dtype} {tuple(one.shape)}")
        size = float(true.double().abs().max()) or 1.0
        error = max(error, float((one.double() - true).abs().max()) / size)
        by_torch = max(by_torch, float((other.double() - true).abs().max()) / size)
    floor = torch.finfo(compute_dtype(args[0])).eps / 2
    return {"op": form.op, "form": form.name, "error": error, "by_torch": by_torch, "floor": floor}


def main() -> None:
    """Prints one JSON object per form, in a list."""
    if not triton.knobs.runtime.interpret:
        sys.exit("run this under TRITON_INTERPRET=1: without a GPU nothing else runs the kernels")
    print(json.dumps([accuracy(form) for form in FORMS]))


if __name__ == "__main__":
    main()
