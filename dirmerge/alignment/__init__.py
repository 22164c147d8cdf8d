"""MDA in feature space: rotations of the features per task, in closed form or learned, folded into the heads.

The merged backbone stays one ordinary checkpoint; every task keeps its own head, with a d × d map of the
features folded in. Closed form (`closed_form`) needs a few hundred unlabelled inputs per task and seconds;
the learned form (`learn`) also moves the scale of every merged parameter, and AdaMerging is its special case.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dirmerge.alignment.config import LearnOptions
    from dirmerge.alignment.features import LastLayerInput, Pooled, classifier
    from dirmerge.alignment.heads import CallableHead, Head, StoredHead, read_head, read_heads, write_head
    from dirmerge.alignment.learning import Learned, LearnProgress, adamerging, learn
    from dirmerge.alignment.maps import TaskMap, closed_form, feature_map, ridge_map
    from dirmerge.alignment.model import AlignmentTask, Model, read_features

_HOME = {
    "AlignmentTask": "model",
    "CallableHead": "heads",
    "Head": "heads",
    "LastLayerInput": "features",
    "LearnOptions": "config",
    "LearnProgress": "learning",
    "Learned": "learning",
    "Model": "model",
    "Pooled": "features",
    "StoredHead": "heads",
    "TaskMap": "maps",
    "adamerging": "learning",
    "classifier": "features",
    "closed_form": "maps",
    "feature_map": "maps",
    "learn": "learning",
    "read_features": "model",
    "read_head": "heads",
    "read_heads": "heads",
    "ridge_map": "maps",
    "write_head": "heads",
}

__all__ = [
    "AlignmentTask",
    "CallableHead",
    "Head",
    "LastLayerInput",
    "LearnOptions",
    "LearnProgress",
    "Learned",
    "Model",
    "Pooled",
    "StoredHead",
    "TaskMap",
    "adamerging",
    "classifier",
    "closed_form",
    "feature_map",
    "learn",
    "read_features",
    "read_head",
    "read_heads",
    "ridge_map",
    "write_head",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: a recipe's configuration must not wait for the learning."""
    if name not in _HOME:
        raise AttributeError(f"module 'dirmerge.alignment' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dirmerge.alignment.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
