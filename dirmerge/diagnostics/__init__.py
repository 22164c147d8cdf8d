"""Directional diagnostics: measures of task deltas and merged updates, `inspect`, and its page."""

from dirmerge.diagnostics.inspection import inspect
from dirmerge.diagnostics.result import Inspection, ModelSummary, ParameterInspection, TaskInspection

__all__ = ["Inspection", "ModelSummary", "ParameterInspection", "TaskInspection", "inspect"]
