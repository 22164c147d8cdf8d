"""Merge methods: pure functions of the tasks' deltas, and the registry that other packages extend."""

from dirmerge.methods.average import average
from dirmerge.methods.dc_merge import dc_merge
from dirmerge.methods.iso import iso_c, iso_cts
from dirmerge.methods.mda import mda
from dirmerge.methods.registry import METHODS, Cost, Method, get_method, merge_tasks, register
from dirmerge.methods.scale import AlignmentTerms, Scale
from dirmerge.methods.spectral import factor_tasks
from dirmerge.methods.task_arithmetic import task_arithmetic
from dirmerge.methods.tasks import Factors, MergedDelta, MergeRecord, Tasks, kept_ranks
from dirmerge.methods.ties import ties
from dirmerge.methods.tsv_m import tsv_m
from dirmerge.methods.whitened import whitened
from dirmerge.methods.wudi import wudi

__all__ = [
    "METHODS",
    "AlignmentTerms",
    "Cost",
    "Factors",
    "MergeRecord",
    "MergedDelta",
    "Method",
    "Scale",
    "Tasks",
    "average",
    "dc_merge",
    "factor_tasks",
    "get_method",
    "iso_c",
    "iso_cts",
    "kept_ranks",
    "mda",
    "merge_tasks",
    "register",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "whitened",
    "wudi",
]
