"""Merging of fine-tuned models by their directions: DC-Merge, MDA and the methods they are compared with."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dirmerge.alignment.run import align
    from dirmerge.api import merge, merge_deltas, plan
    from dirmerge.backends import backend
    from dirmerge.deltas.difference import Difference
    from dirmerge.deltas.lowrank import LowRank
    from dirmerge.diagnostics import inspect
    from dirmerge.methods import MergedDelta

__version__ = "0.1.0"

__all__ = [
    "Difference",
    "LowRank",
    "MergedDelta",
    "__version__",
    "align",
    "backend",
    "inspect",
    "merge",
    "merge_deltas",
    "plan",
]

_HOME = {
    "Difference": "dirmerge.deltas.difference",
    "LowRank": "dirmerge.deltas.lowrank",
    "MergedDelta": "dirmerge.methods",
    "align": "dirmerge.alignment.run",
    "backend": "dirmerge.backends",
    "inspect": "dirmerge.diagnostics",
    "merge": "dirmerge.api",
    "merge_deltas": "dirmerge.api",
    "plan": "dirmerge.api",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: `dirmerge --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dirmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
