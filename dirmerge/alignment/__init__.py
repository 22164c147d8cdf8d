"""MDA in feature space: rotations of the features per task, in closed form or learned, folded into the heads.

The merged backbone stays one ordinary checkpoint; every task keeps its own head, with a d × d map of the
features folded in. Closed form (`closed_form`) needs a few hundred unlabelled inputs per task and seconds;
the learned form (`learn`) also moves the scale of every merged parameter, and AdaMerging is its special case.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dirmerge.alignment.features import LastLayerInput, Pooled, classifier
    from dirmerge.alignment.heads import CallableHead, Head, StoredHead, read_head, read_heads, write_head
    from dirmerge.alignment.learned import Learned, LearnProgress
    from dirmerge.alignment.learning import adamerging, learn
    from dirmerge.alignment.maps import TaskMap, closed_form, feature_map, ridge_map
    from dirmerge.alignment.model import AlignmentTask, Model, read_features
    from dirmerge.recipe.align import LearnOptions

_HOME = {
    "LearnOptions": "dirmerge.recipe.align",
    "AlignmentTask": "dirmerge.alignment.model",
    "CallableHead": "dirmerge.alignment.heads",
    "Head": "dirmerge.alignment.heads",
    "LastLayerInput": "dirmerge.alignment.features",
    "LearnProgress": "dirmerge.alignment.learned",
    "Learned": "dirmerge.alignment.learned",
    "Model": "dirmerge.alignment.model",
    "Pooled": "dirmerge.alignment.features",
    "StoredHead": "dirmerge.alignment.heads",
    "TaskMap": "dirmerge.alignment.maps",
    "adamerging": "dirmerge.alignment.learning",
    "classifier": "dirmerge.alignment.features",
    "closed_form": "dirmerge.alignment.maps",
    "feature_map": "dirmerge.alignment.maps",
    "learn": "dirmerge.alignment.learning",
    "read_features": "dirmerge.alignment.model",
    "read_head": "dirmerge.alignment.heads",
    "read_heads": "dirmerge.alignment.heads",
    "ridge_map": "dirmerge.alignment.maps",
    "write_head": "dirmerge.alignment.heads",
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
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
