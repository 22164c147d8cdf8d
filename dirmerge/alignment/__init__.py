"""MDA in feature space: rotations of the features per task, in closed form or learned, folded into the heads.

The merged backbone stays one ordinary checkpoint; every task keeps its own head, with a d × d map of the
features folded in. Closed form (`closed_form`) needs a few hundred unlabelled inputs per task and seconds;
the learned form (`learn`) also moves the scale of every merged parameter, and AdaMerging is its special case.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AlignmentTask": "model",
    "CallableHead": "heads",
    "Head": "heads",
    "LastLayerInput": "features",
    "Model": "model",
    "Pooled": "features",
    "StoredHead": "heads",
    "TaskMap": "maps",
    "classifier": "features",
    "closed_form": "maps",
    "feature_map": "maps",
    "read_features": "model",
    "read_head": "heads",
    "read_heads": "heads",
    "ridge_map": "maps",
    "write_head": "heads",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: a recipe's configuration must not wait for the learning."""
    if name not in _HOME:
        raise AttributeError(f"module 'dirmerge.alignment' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dirmerge.alignment.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
