"""Results of an inspection: plain data, per matrix and for the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from dirmerge.methods import AlignmentTerms

Number = float | None


class _Data(BaseModel):
    """Plain data without NaN and Inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pairs(_Data):
    """Relations of the tasks' subspaces: T × T tables, None where a task has no subspace."""

    overlap: list[list[Number]]
    chance: list[list[Number]]
    mean_angle: list[list[Number]]
    smallest_angle: list[list[Number]]

    def mean_off_diagonal(self, name: str) -> Number:
        """Returns the mean of a table over the pairs of different tasks, None where there is none."""
        table = getattr(self, name)
        return _mean(value for i, row in enumerate(table) for value in row[:i])


class TaskInspection(_Data):
    """One task's delta D_t of one matrix.

    Attributes:
        norm: ‖w_t D_t‖_F.
        directions: leading singular directions kept, r_t.
        core_energy: their energy Σ s².
        kept_energy: the same as a share of ‖D_t‖²_F.
        directions_90: how few singular values hold 90 % of the energy; None: more than were computed.
        stable_rank: ‖D_t‖²_F / σ_1².
        energy_curve: energy held by 1, 2, 4, … singular values.
        alignment: a_t(λD), the fraction of the leading component that the merged update reproduces.
        similarity_before: DirSim of the plain weighted sum of the tasks.
        similarity_after: DirSim of the merged update.
        opposed: share of the magnitude that opposes the sign of the sum.
    """

    norm: float
    directions: int
    core_energy: float
    kept_energy: float
    directions_90: int | None
    stable_rank: float
    energy_curve: list[float]
    alignment: Number
    similarity_before: Number
    similarity_after: Number
    opposed: float


class ParameterInspection(_Data):
    """One matrix.

    Attributes:
        name: name of the tensor, with its number in a stack.
        shape: (m, n).
        scale: λ.
        tasks: one per task of the merge, None for those that take no part.
        left: the tasks' left subspaces (outputs), right: the right ones (inputs).
        interference: singular task interference over Σ s, None where no task changes the matrix.
        interference_chance: the same expected of random singular vectors with these spectra.
        alignment: a(λD) over all tasks.
        outside_etf: energy of the merged update outside the ETF subspace, None where the frame does not fit.
        outside_etf_shared: the same of the tasks' shared component, 1/√K.
        sign_conflict: share of the entries that tasks change with both signs; sign_chance: that of chance.
        opposed: share of the magnitude that opposes the sign of the sum.
        accumulation: leading singular values of the plain sum over those of orthogonal tasks.
        accumulation_merged: the same of λD.
        merged_norm: ‖λD‖_F.
        merged_stable_rank: stable rank of D.
        notes: remarks on this matrix.
    """

    name: str
    shape: tuple[int, int]
    scale: float
    tasks: list[TaskInspection | None]
    left: Pairs
    right: Pairs
    interference: Number
    interference_chance: Number
    alignment: Number
    outside_etf: Number
    outside_etf_shared: Number
    sign_conflict: float
    sign_chance: float
    opposed: float
    accumulation: list[float]
    accumulation_merged: list[float]
    merged_norm: float
    merged_stable_rank: float
    notes: list[str]

    @property
    def is_changed(self) -> bool:
        """Whether any task changes the matrix."""
        return any(task is not None and task.norm > 0 for task in self.tasks)

    def scaled(self, factor: float) -> ParameterInspection:
        """Returns the inspection of factor · D: alignments, norm and singular values are scaled."""
        sign = (factor > 0) - (factor < 0)
        tasks = [
            task
            and task.model_copy(
                update={
                    "alignment": _times(task.alignment, factor),
                    "similarity_after": _times(task.similarity_after, sign),
                }
            )
            for task in self.tasks
        ]
        size = abs(factor)
        return self.model_copy(
            update={
                "scale": self.scale * factor,
                "tasks": tasks,
                "alignment": _times(self.alignment, factor),
                "accumulation_merged": [value * size for value in self.accumulation_merged],
                "merged_norm": self.merged_norm * size,
            }
        )


class TaskSummary(_Data):
    """One task over the whole model: means over the matrices it changes, sums first for the alignment.

    Attributes:
        norm: ‖w_t D_t‖_F over all matrices.
        directions_90: mean; None where it is not known of every matrix.
        stable_rank: mean.
        energy_curve: mean share of the energy held by 1, 2, 4, … singular values, as far as all have them.
        alignment: Σ of the numerators over Σ of the denominators.
        similarity_before: mean DirSim of the plain sum.
        similarity_after: mean DirSim of the merged update.
        opposed: mean.
    """

    norm: float
    directions_90: Number
    stable_rank: Number
    energy_curve: list[float]
    alignment: Number
    similarity_before: Number
    similarity_after: Number
    opposed: Number


class ModelSummary(_Data):
    """The whole model: means over the matrices that a task changes, sums first for alignment and signs.

    Attributes:
        tasks: one per task.
        left: mean tables of the left subspaces, right: of the right ones.
        left_overlap: mean over matrices and pairs of tasks; left_chance: its chance level. So for right.
        interference: mean over matrices of the interference over Σ s; interference_chance: chance level.
        alignment: a(λD) of the model.
        outside_etf: mean.
        outside_etf_shared: mean.
        sign_conflict: over all entries; sign_chance: its chance level.
        opposed: mean over matrices.
        accumulation: mean of the first ratio of the plain sum; accumulation_largest: its largest.
        accumulation_merged: mean of the first ratio of λD.
        merged_stable_rank: mean.
    """

    tasks: list[TaskSummary]
    left: Pairs
    right: Pairs
    left_overlap: Number
    left_chance: Number
    right_overlap: Number
    right_chance: Number
    interference: Number
    interference_chance: Number
    alignment: Number
    outside_etf: Number
    outside_etf_shared: Number
    sign_conflict: Number
    sign_chance: Number
    opposed: Number
    accumulation: Number
    accumulation_largest: Number
    accumulation_merged: Number
    merged_stable_rank: Number


class Inspection(_Data):
    """A merge, seen by its directions.

    Attributes:
        dirmerge: version.
        source: the recipe or the folder.
        finished: whether the merged update was read from a finished merge, not computed for this inspection.
        method: name of the method.
        options: those the recipe sets.
        scale: how λ was chosen, in words.
        base: its name, None for adapters alone.
        tasks: names of the fine-tunes as the recipe has them.
        parameters: the matrices that are merged by the method, in the model's order.
        left_out: number of other tensors by rule.
        class_gaps: Δ_ETF by name, of the class means that were given.
        summary: the whole model.
        notes: facts about the whole merge.
        compute: where it ran: device, why this one, threads and memory.
        seconds: time taken.
    """

    dirmerge: str
    source: str
    finished: bool
    method: str
    options: dict[str, Any]
    scale: str
    base: str | None
    tasks: list[str]
    parameters: list[ParameterInspection]
    left_out: dict[str, int]
    class_gaps: dict[str, float]
    summary: ModelSummary
    notes: list[str]
    compute: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON)."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Inspection:
        """Returns the inspection that `to_dict` gave as plain data."""
        return cls.model_validate(plain)


def alignment_terms(tasks: Sequence[TaskInspection | None]) -> AlignmentTerms:
    """Returns the two sums of a(λD) over tasks, of one matrix or of many."""
    aligned = [(t.alignment, t.core_energy) for t in tasks if t is not None and t.alignment is not None]
    return AlignmentTerms(sum(a * energy for a, energy in aligned), sum(energy for _, energy in aligned))


def total_alignment(tasks: Sequence[TaskInspection | None]) -> float | None:
    """Returns a(λD) over tasks, None where no task changes anything."""
    return alignment_terms(tasks).value


def summarise(parameters: Sequence[ParameterInspection], count: int) -> ModelSummary:
    """Returns the figures of a whole model, or of a part of it.

    Args:
        parameters: at least one matrix.
        count: T.
    """
    parameters = [parameter for parameter in parameters if parameter.is_changed]
    entries = [math.prod(p.shape) for p in parameters]
    left, right = (_mean_pairs([getattr(p, side) for p in parameters], count) for side in ("left", "right"))
    return ModelSummary(
        tasks=[_task_summary([p.tasks[t] for p in parameters]) for t in range(count)],
        left=left,
        right=right,
        left_overlap=left.mean_off_diagonal("overlap"),
        left_chance=left.mean_off_diagonal("chance"),
        right_overlap=right.mean_off_diagonal("overlap"),
        right_chance=right.mean_off_diagonal("chance"),
        interference=_mean(p.interference for p in parameters),
        interference_chance=_mean(p.interference_chance for p in parameters),
        alignment=total_alignment([task for p in parameters for task in p.tasks]),
        outside_etf=_mean(p.outside_etf for p in parameters),
        outside_etf_shared=_mean(p.outside_etf_shared for p in parameters),
        sign_conflict=_mean((p.sign_conflict for p in parameters), entries),
        sign_chance=_mean((p.sign_chance for p in parameters), entries),
        opposed=_mean(p.opposed for p in parameters),
        accumulation=_mean(_first(p.accumulation) for p in parameters),
        accumulation_largest=max((p.accumulation[0] for p in parameters if p.accumulation), default=None),
        accumulation_merged=_mean(_first(p.accumulation_merged) for p in parameters),
        merged_stable_rank=_mean(p.merged_stable_rank for p in parameters),
    )


def _task_summary(found: Sequence[TaskInspection | None]) -> TaskSummary:
    tasks = [task for task in found if task is not None and task.norm > 0]
    known = [task.directions_90 for task in tasks if task.directions_90 is not None]
    curves = [task.energy_curve for task in tasks if task.energy_curve]
    length = min((len(curve) for curve in curves), default=0)
    return TaskSummary(
        norm=math.sqrt(sum(task.norm**2 for task in tasks)),
        directions_90=_mean(known) if len(known) == len(tasks) else None,
        stable_rank=_mean(task.stable_rank for task in tasks),
        energy_curve=[sum(curve[i] for curve in curves) / len(curves) for i in range(length)],
        alignment=total_alignment(tasks),
        similarity_before=_mean(task.similarity_before for task in tasks),
        similarity_after=_mean(task.similarity_after for task in tasks),
        opposed=_mean(task.opposed for task in tasks),
    )


def _mean_pairs(pairs: Sequence[Pairs], count: int) -> Pairs:
    return Pairs(
        **{
            name: [
                [_mean(getattr(pair, name)[i][j] for pair in pairs) for j in range(count)]
                for i in range(count)
            ]
            for name in Pairs.model_fields
        }
    )


def _mean(values: Iterable[float | None], weights: Sequence[float] | None = None) -> float | None:
    """Returns the mean of the known values, None if there is none."""
    listed = list(values)
    sizes = [1.0] * len(listed) if weights is None else weights
    known = [(value, size) for value, size in zip(listed, sizes, strict=True) if value is not None]
    whole = sum(size for _, size in known)
    return sum(value * size for value, size in known) / whole if whole else None


def _first(values: Sequence[float]) -> float | None:
    return values[0] if values else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
