"""The Triton launchers in the backend table: one per op, imported, and Triton with it, on its first call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dirmerge.backends import FLOATING, implements

_UP_TO_FLOAT32 = (torch.bfloat16, torch.float16, torch.float32)

_DTYPES = {
    "delta_sketch": _UP_TO_FLOAT32,
    "elect_merge": FLOATING,
    "etf_project": FLOATING,
    "gram": _UP_TO_FLOAT32,
    "kth_largest_magnitude": FLOATING,
    "lowrank_add": _UP_TO_FLOAT32,
    "polar_step": _UP_TO_FLOAT32,
    "rotation_step": (torch.float32,),
}


def _launcher(op: str) -> Callable[..., Any]:
    def launch(*args: Any, **kwargs: Any) -> Any:
        module = importlib.import_module(f"dirmerge.triton_kernels.{op}")
        return getattr(module, op)(*args, **kwargs)

    return launch


for _name, _taken in _DTYPES.items():
    implements(_name, "triton", devices=("cuda",), dtypes=_taken)(_launcher(_name))
