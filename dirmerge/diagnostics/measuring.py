"""The measures of one matrix: its tasks' spaces, their conflicts, and what the merged update keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dirmerge.deltas.lowrank import LowRank
from dirmerge.diagnostics import measures
from dirmerge.diagnostics.result import Number, Pairs, ParameterInspection, TaskInspection, total_alignment
from dirmerge.diagnostics.updates import Updates
from dirmerge.engine.deltas import DeltaReader, check_finite, row_range
from dirmerge.engine.reading import Read
from dirmerge.engine.result import Progress, ProgressCallback
from dirmerge.engine.work import MatrixWork, matrices
from dirmerge.errors import RecipeError
from dirmerge.linalg import svd_truncated
from dirmerge.methods import Factors, MergeRecord, Tasks, factor_tasks, kept_ranks
from dirmerge.methods.mda import column_signs
from dirmerge.methods.spectral import cover_space
from dirmerge.methods.tasks import Delta, sum_tasks
from dirmerge.planning import Plan, Source, TensorPlan

# Up to this min(m, n) all singular values of a dense delta are computed, above it the kept ones.
SPECTRUM_UP_TO = 1024
# Leading singular values that are compared with the tasks'.
LEADING = 8
# Entries of all tasks' rows that are compared at a time for their signs.
BLOCK_ENTRIES = 1 << 22

Parameters = list[tuple[TensorPlan, ParameterInspection]]


def is_inspected(tensor: TensorPlan) -> bool:
    """Whether the tensor is a matrix that the method merges, not a table of vectors."""
    return tensor.rule == "merge" and tensor.aligned


class Inspector:
    """Measures every matrix of a plan, one after another, on one device.

    What has the size of a matrix or of its bases stays on the device; vectors of singular values come to the
    CPU once.
    """

    def __init__(
        self, plan: Plan, updates: Updates, device: torch.device, progress: ProgressCallback | None
    ) -> None:
        self.plan = plan
        self.updates = updates
        self.device = device
        self.read = DeltaReader.of(plan)
        self._progress = progress

    def parameters(self) -> Parameters:
        """Measures every matrix."""
        chosen = [tensor for tensor in self.plan.tensors if is_inspected(tensor)]
        if not chosen:
            raise RecipeError(
                f"{self.plan.origin}: {self.plan.method_name} merges no matrix of these models: there "
                "is nothing to inspect"
            )
        self.read.check_base_copies()
        work = [item for tensor in chosen for item in matrices(self.plan, tensor)]
        entries = sum(math.prod(self.read.matrix_shape(item.tensor)) for item in work)
        found: Parameters = []
        done_entries = 0
        for done, item in enumerate(work, 1):
            found.append((item.tensor, self._matrix(item)))
            done_entries += math.prod(self.read.matrix_shape(item.tensor))
            if self._progress is not None:
                self._progress(Progress("inspect", item.name, done, len(work), 0, 0, done_entries / entries))
        return found

    def _matrix(self, work: MatrixWork) -> ParameterInspection:
        tensor, index, seed = work.tensor, work.index, work.seed
        tasks, weights = self.read.tasks(tensor, index, self.device)
        sources = [source for source in tensor.sources if source.weight != 0]
        update, factors, notes = self.updates.get(tensor, index, tasks, weights, seed)
        wanted = kept_ranks(tasks)
        if factors is None or factors.asked != wanted:
            factors = factor_tasks(tasks, wanted, "auto", 1e-2, seed)
        spectra = [_spectrum(tasks, t, factors) for t in range(len(tasks))]
        core = [s.cpu() for s in factors.s]
        weighted = [abs(w) * s for w, (s, _) in zip(weights, spectra, strict=True)]
        total = sum_tasks(tasks, weights)
        before, after = (measures.response(x, factors.u, factors.v).on_host() for x in (total, update))
        leading = _leading(total, seed), _leading(update, seed)
        del total
        signs = measures.sign_conflicts(self._row_blocks(tensor, index, sources))
        blocks = factors.blocks()
        per_task: list[TaskInspection | None] = [None] * len(self.plan.tasks)
        for t, source in enumerate(sources):
            s, energy = spectra[t]
            kept = core[t]
            present = len(kept) > 0
            per_task[source.task] = TaskInspection(
                norm=abs(weights[t]) * math.sqrt(energy),
                directions=len(kept),
                core_energy=float(kept.double().square().sum()),
                kept_energy=factors.energy[t],
                directions_90=measures.energy_directions(s, 0.9, energy),
                stable_rank=measures.stable_rank(s, energy),
                energy_curve=measures.energy_curve(s, energy),
                alignment=measures.task_alignment(after, kept, blocks[t]) if present else None,
                similarity_before=measures.directional_similarity(before, blocks[t]) if present else None,
                similarity_after=measures.directional_similarity(after, blocks[t]) if present else None,
                opposed=signs.opposed_by_task[t],
            )
        sizes = torch.cat(factors.s)
        mass = float(torch.cat(core).sum(dtype=torch.float64))
        interference = chance = None
        if mass > 0:
            interference = measures.task_interference(factors.u, sizes, factors.v) / mass
            chance = measures.chance_interference(core, *_matrix_shape(tasks)) / mass
        norm = _norm(update)
        return ParameterInspection(
            name=work.name,
            shape=_matrix_shape(tasks),
            scale=1.0,
            tasks=per_task,
            left=self._pairs(factors.u, blocks, sources),
            right=self._pairs(factors.v, blocks, sources),
            interference=interference,
            interference_chance=chance,
            alignment=total_alignment(per_task),
            outside_etf=_outside_etf(update, factors),
            outside_etf_shared=1 / math.sqrt(len(sizes)) if len(sizes) > 1 else None,
            sign_conflict=signs.share,
            sign_chance=signs.chance,
            opposed=signs.opposed,
            accumulation=measures.accumulation(leading[0], weighted, LEADING),
            accumulation_merged=measures.accumulation(leading[1], weighted, LEADING),
            merged_norm=norm,
            merged_stable_rank=measures.stable_rank(leading[1], norm**2),
            notes=list(dict.fromkeys(notes)),
        )

    def _pairs(self, bases: Tensor, blocks: Sequence[slice], sources: Sequence[Source]) -> Pairs:
        """Returns the tables of the participating tasks, placed among all tasks."""
        found = measures.compare_spaces(bases, blocks)
        count = len(self.plan.tasks)
        tables = {}
        for name in Pairs.model_fields:
            table: list[list[Number]] = [[None] * count for _ in range(count)]
            for i, row in zip(sources, getattr(found, name), strict=True):
                for j, value in zip(sources, row, strict=True):
                    table[i.task][j.task] = value
            tables[name] = table
        return Pairs(**tables)

    def _row_blocks(
        self, tensor: TensorPlan, index: int | None, sources: Sequence[Source]
    ) -> Iterator[Tensor]:
        """Yields (T, rows, n): the same rows of all weighted deltas; adapters are multiplied out by rows.

        Rows are copied to the device in their stored dtype.
        """
        m, n = self.read.matrix_shape(tensor)
        updates = {t: update.to(self.device) for t, update in self.read.low_ranks(tensor).items()}
        is_dense = any(source.rank is None for source in sources)
        step = max(1, BLOCK_ENTRIES // (n * len(sources)))
        ranges = (
            [(start, min(start + step, m)) for start in range(0, m, step)]
            if index is None
            else [(index, index + 1)]
        )
        for start, stop in ranges:
            base = self._fetch(self.read.base_read(tensor.name, start, stop)) if is_dense else None
            rows = []
            for source in sources:
                read, update = self.read.value_read(source, start, stop), updates.get(source.task)
                value = None if read is None else self._fetch(read)
                part = None if update is None else row_range(update, start, stop)
                rows.append(self.read.combine(value, base, part).reshape(-1, n).mul_(source.weight))
            yield torch.stack(rows)

    def _fetch(self, read: Read) -> Tensor:
        """Returns finite rows on the device, in their stored dtype."""
        return check_finite(self.read.fetch(read).to(self.device), read.info, read.item)


def _matrix_shape(tasks: Tasks) -> tuple[int, int]:
    m, n = tasks.shape
    return m, n


def _spectrum(tasks: Tasks, t: int, factors: Factors) -> tuple[Tensor, float]:
    """Returns the known singular values of a task, on the CPU, and ‖D_t‖²_F."""
    if tasks.ranks[t] is None and min(tasks.shape) > SPECTRUM_UP_TO:
        s = factors.s[t].cpu().double()
        return s, float(s.square().sum()) / factors.energy[t] if factors.energy[t] > 0 else 0.0
    s = measures.singular_values(tasks[t]).cpu()
    return s, float(s.square().sum())


def _leading(delta: Delta, seed: int) -> Tensor:
    """Returns at least the leading singular values of an update, on the CPU."""
    if isinstance(delta, LowRank) or min(delta.shape) <= SPECTRUM_UP_TO:
        return measures.singular_values(delta).cpu()
    return svd_truncated(delta, LEADING, "auto", seed=seed).s.cpu().double()


def _norm(delta: Delta) -> float:
    if isinstance(delta, LowRank):
        return delta.norm()
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64))


def _outside_etf(update: Delta, factors: Factors) -> float | None:
    m, k = factors.u.shape
    if not 2 <= k <= m:
        return None
    frame = cover_space(factors.u, "auto", "left", MergeRecord("inspect", {}, tuple(update.shape))).frame()
    return measures.energy_outside_etf(update, frame, column_signs(factors.u))
