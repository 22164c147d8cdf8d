"""Merging of fine-tuned models by their directions: DC-Merge, MDA and the methods they are compared with."""

from dirmerge.api import merge, plan
from dirmerge.backends import backend
from dirmerge.lowrank import LowRank
from dirmerge.methods import MergedDelta, merge_deltas

__version__ = "0.1.0"

__all__ = ["LowRank", "MergedDelta", "__version__", "backend", "merge", "merge_deltas", "plan"]
