"""Primitives: one formula each, a torch op `dirmerge::<name>` with a schema, a fake and a torch default.

The functions here validate and call the op. None is differentiable: a backward pass through one raises
instead of giving wrong gradients. dirmerge.backends says which implementation runs.
"""

from dirmerge.ops import _triton  # noqa: F401  enters the Triton launchers into the table
from dirmerge.ops.delta import Delta, delta
from dirmerge.ops.delta_add import DeltaAdd, delta_add
from dirmerge.ops.delta_elect_add import delta_elect_add
from dirmerge.ops.delta_kth_magnitude import DeltaKthMagnitude, delta_kth_magnitude
from dirmerge.ops.delta_sketch import DeltaSketch, delta_sketch
from dirmerge.ops.elect_merge import elect_merge
from dirmerge.ops.etf_project import etf_project
from dirmerge.ops.gram import gram
from dirmerge.ops.kth_largest_magnitude import kth_largest_magnitude
from dirmerge.ops.lowrank_add import lowrank_add
from dirmerge.ops.polar_step import polar_step
from dirmerge.ops.rotation_step import RotationStep, rotation_step

__all__ = [
    "Delta",
    "DeltaAdd",
    "DeltaKthMagnitude",
    "DeltaSketch",
    "RotationStep",
    "delta",
    "delta_add",
    "delta_elect_add",
    "delta_kth_magnitude",
    "delta_sketch",
    "elect_merge",
    "etf_project",
    "gram",
    "kth_largest_magnitude",
    "lowrank_add",
    "polar_step",
    "rotation_step",
]
