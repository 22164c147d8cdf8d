"""Primitives: one formula each, a torch op `dirmerge::<name>` with a schema, a fake and a torch default.

The functions here validate and call the op. None is differentiable: a backward pass through one raises
instead of giving wrong gradients. dirmerge.backends says which implementation runs.
"""

from dirmerge.ops.delta import Delta, delta
from dirmerge.ops.elect_merge import elect_merge
from dirmerge.ops.etf_project import etf_project
from dirmerge.ops.kth_largest_magnitude import kth_largest_magnitude
from dirmerge.ops.lowrank_add import lowrank_add

__all__ = ["Delta", "delta", "elect_merge", "etf_project", "kth_largest_magnitude", "lowrank_add"]
