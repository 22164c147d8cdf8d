"""Measures of task deltas and of a merged update: pure functions of factors and entries, no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dirmerge.deltas.difference import Difference
from dirmerge.deltas.lowrank import LowRank
from dirmerge.linalg import single_thread
from dirmerge.methods.tasks import Delta

__all__ = [
    "Response",
    "SignConflicts",
    "SpacePairs",
    "accumulation",
    "chance_interference",
    "chance_overlap",
    "compare_spaces",
    "directional_similarity",
    "energy_curve",
    "energy_directions",
    "energy_outside_etf",
    "principal_angles",
    "response",
    "sign_conflicts",
    "singular_values",
    "stable_rank",
    "subspace_overlap",
    "task_alignment",
    "task_interference",
]


def singular_values(delta: Delta | Difference) -> Tensor:
    """Computes all singular values of a delta, descending, as the roots of the eigenvalues of a Gram matrix.

    Args:
        delta: (m, n); of a LowRank only its k values.

    Returns:
        (min(m, n),) or (k,) float64.

    Accuracy:
        1e-8 of the largest for dense matrices (a float64 Gram matrix).
    """
    if isinstance(delta, LowRank):
        return delta.svd().s.double()
    if delta.shape[0] < delta.shape[1]:
        delta = delta.mT
    if isinstance(delta, Difference):
        gram = delta.gram(torch.float64)[0]
    else:
        wide = delta.double()
        gram = wide.mT @ wide
    with single_thread(gram.shape[-1]):
        values: Tensor = torch.linalg.eigvalsh(gram)
    return values.clamp(min=0).sqrt().flip(-1)


def energy_directions(s: Tensor, share: float = 0.9, total: float | None = None) -> int | None:
    """Computes the smallest k with Σ_{i≤k} s_i² ≥ share · ‖D‖²_F: how few directions hold the energy.

    Args:
        s: (k,) leading singular values, descending.
        share: of the energy, in (0, 1].
        total: ‖D‖²_F; default Σ s², which is right when s is complete.

    Returns:
        k, 0 for a zero matrix, None where the given values do not hold the share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    squares = s.double().square()
    whole = float(squares.sum()) if total is None else total
    if whole == 0:
        return 0
    # A rounding of the sum must not ask for one more direction.
    reached = (squares.cumsum(0) >= share * whole * (1 - 1e-12)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None


def energy_curve(s: Tensor, total: float | None = None) -> list[float]:
    """Computes Σ_{i≤k} s_i² / ‖D‖²_F at k = 1, 2, 4, … as far as there are values.

    Args:
        s: (k,) leading singular values, descending.
        total: ‖D‖²_F; default Σ s².

    Returns:
        One share per power of two; empty for a zero matrix.
    """
    squares = s.double().square()
    whole = float(squares.sum()) if total is None else total
    if whole == 0 or len(s) == 0:
        return []
    sums = squares.cumsum(0) / whole
    return [min(1.0, float(sums[k - 1])) for k in (1 << i for i in range(len(s).bit_length()))]


def stable_rank(s: Tensor, total: float | None = None) -> float:
    """Computes ‖D‖²_F / σ_1², between 1 and the rank; 0 for a zero matrix.

    Args:
        s: (k,) leading singular values, descending.
        total: ‖D‖²_F; default Σ s².

    Source:
        Rudelson, Vershynin, J. ACM 54 (2007).
    """
    squares = s.double().square()
    if len(s) == 0 or float(squares[0]) == 0:
        return 0.0
    return (float(squares.sum()) if total is None else total) / float(squares[0])


def subspace_overlap(u: Tensor, v: Tensor) -> float:
    """Computes ‖UᵀV‖²_F / min(r_u, r_v), the mean squared cosine of the principal angles.

    Args:
        u: (m, r_u) orthonormal columns.
        v: (m, r_v) orthonormal columns.

    Returns:
        0 for orthogonal spaces, 1 where the smaller lies in the larger; `chance_overlap` for random ones.
    """
    least = min(u.shape[1], v.shape[1])
    if least == 0:
        raise ValueError("an empty subspace overlaps with nothing: both need a column")
    return float((u.mT @ v).double().square().sum()) / least


def chance_overlap(m: int, r_u: int, r_v: int) -> float:
    """Computes max(r_u, r_v) / m, the overlap expected of independent uniformly random subspaces of R^m."""
    return max(r_u, r_v) / m


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """Computes the principal angles arccos σ_i(UᵀV) between two subspaces, ascending, in radians.

    Args:
        u: (m, r_u) orthonormal columns.
        v: (m, r_v) orthonormal columns.

    Returns:
        (min(r_u, r_v),) float64.

    Accuracy:
        √ε near 0, where the cosine is flat: 2e-8 for float64 bases, 3e-4 (0.02°) for float32 ones.

    Source:
        Björck, Golub, Math. Comp. 27 (1973).
    """
    return _angles((u.mT @ v).double())


def _angles(cross: Tensor) -> Tensor:
    with single_thread(max(cross.shape)):
        angles: Tensor = torch.linalg.svdvals(cross).clamp(max=1.0).arccos()
    return angles


@dataclass(frozen=True)
class SpacePairs:
    """How T subspaces lie to each other; every field is T × T, symmetric, None where one is empty.

    Attributes:
        overlap: ‖U_iᵀU_j‖²_F / min(r_i, r_j).
        chance: the same expected of random subspaces, max(r_i, r_j) / m.
        mean_angle: mean principal angle in degrees.
        smallest_angle: smallest principal angle in degrees.
    """

    overlap: list[list[float | None]]
    chance: list[list[float | None]]
    mean_angle: list[list[float | None]]
    smallest_angle: list[list[float | None]]


def compare_spaces(bases: Tensor, blocks: Sequence[slice]) -> SpacePairs:
    """Computes overlap and principal angles of all pairs of task subspaces, from the Gram matrix [U_t]ᵀ[U_t].

    Args:
        bases: (m, K) orthonormal bases side by side.
        blocks: per task its columns.
    """
    count = len(blocks)
    empty: list[list[float | None]] = [[None] * count for _ in range(count)]
    pairs = SpacePairs(*([row[:] for row in empty] for _ in range(4)))
    gram = (bases.mT @ bases).double()
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks[: i + 1]):
            sizes = a.stop - a.start, b.stop - b.start
            if min(sizes) == 0:
                continue
            cross = gram[a, b]
            angles = _angles(cross).rad2deg()
            # One wait for the device, not three.
            energy, mean, smallest = (
                torch.stack((cross.square().sum(), angles.mean(), angles.min())).cpu().tolist()
            )
            found = (
                (pairs.overlap, energy / min(sizes)),
                (pairs.chance, chance_overlap(bases.shape[0], *sizes)),
                (pairs.mean_angle, mean),
                (pairs.smallest_angle, smallest),
            )
            for table, value in found:
                table[i][j] = table[j][i] = value
    return pairs


def task_interference(u: Tensor, s: Tensor, v: Tensor) -> float:
    """Computes the singular task interference ‖(UᵀU − I) Σ (VᵀV − I)‖₁, the sum of the entries' magnitudes.

    0 if the tasks' singular vectors are orthogonal across tasks on one side. It grows with Σ: divide by Σ s
    to compare parameters. The published text writes ‖·‖₁; the entrywise norm is our reading.

    Args:
        u: (m, K) left bases of all tasks side by side.
        s: (K,) their singular values.
        v: (n, K) right bases.

    Source:
        Gargiulo et al., Task Singular Vectors, CVPR 2025, singular task interference.
    """
    left, right = u.mT @ u, v.mT @ v
    left.diagonal().sub_(1)
    right.diagonal().sub_(1)
    return float(((left * s) @ right).abs().sum(dtype=torch.float64))


def chance_interference(s: Sequence[Tensor], m: int, n: int) -> float:
    """Computes the interference expected of T tasks whose singular vectors are random, with these spectra.

    Entry (a, b) of block (i, j) is a sum over the directions c of tasks other than i and j, of variance
    Σ s_c² / (m n); the mean magnitude of a Gaussian is √(2/π) of its deviation.

    Args:
        s: per task (r_t,) singular values.
        m: rows of the deltas.
        n: columns of the deltas.

    Accuracy:
        a few per cent for m, n and r_t of some tens.
    """
    energy = [float(values.double().square().sum()) for values in s]
    total = 0.0
    for i, a in enumerate(s):
        for j, b in enumerate(s):
            others = sum(e for t, e in enumerate(energy) if t not in (i, j))
            total += len(a) * len(b) * math.sqrt(2 / math.pi * others / (m * n))
    return total


@dataclass(frozen=True, eq=False)
class Response:
    """What a matrix D does to singular vectors u_i, v_i.

    Attributes:
        diagonal: (K,) float64 u_iᵀ D v_i.
        right: (K,) float64 ‖D v_i‖.
        left: (K,) float64 ‖Dᵀ u_i‖.
        floor: ε √max(m, n) ‖D‖_F, below which a norm is rounding.
    """

    diagonal: Tensor
    right: Tensor
    left: Tensor
    floor: float

    def on_host(self) -> Response:
        """Returns it with its vectors on the CPU."""
        return Response(self.diagonal.cpu(), self.right.cpu(), self.left.cpu(), self.floor)


def response(delta: Delta, u: Tensor, v: Tensor) -> Response:
    """Computes u_iᵀ D v_i, ‖D v_i‖ and ‖Dᵀ u_i‖ of pairs of singular vectors; a LowRank stays factored.

    Args:
        delta: (m, n) D.
        u: (m, K).
        v: (n, K).
    """
    if isinstance(delta, LowRank):
        a, b = delta.folded()
        forward, backward, size = a @ (b.mT @ v), b @ (a.mT @ u), delta.norm()
    else:
        forward, backward = delta @ v, delta.mT @ u
        size = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    diagonal = (u * forward).sum(0, dtype=torch.float64)
    right, left = (torch.linalg.vector_norm(x, dim=0, dtype=torch.float64) for x in (forward, backward))
    floor = torch.finfo(forward.dtype).eps * math.sqrt(max(len(u), len(v))) * size
    return Response(diagonal, right, left, floor)


def directional_similarity(found: Response, block: slice) -> float:
    """Computes DirSim = ½ mean_i (cos(D v_i, u_i) + cos(Dᵀu_i, v_i)), how nearly D maps each v_i to u_i.

    Every direction of the task counts alike, however little energy it has, and the scale of D does not count.
    1 for the task's own delta and for a sum of tasks orthogonal on both sides, 0 for an unrelated D; a
    direction that D maps to 0 counts 0. The published summary describes directional consistency between the
    merged update and a task's singular space without fixing a formula; this one is our reading.

    Args:
        found: of the merged update D on all tasks' singular vectors.
        block: the task's columns.

    Source:
        DC-Merge, arXiv 2603.06242 (directional consistency of singular spaces).
    """
    diagonal = found.diagonal[block]
    cosines = [
        torch.where(norms > found.floor, diagonal / norms, 0.0)
        for norms in (found.right[block], found.left[block])
    ]
    return float((cosines[0] + cosines[1]).mean()) / 2


def task_alignment(found: Response, s: Tensor, block: slice) -> float:
    """Computes a_t(D) = Σ_i s_i u_iᵀ D v_i / Σ_i s_i², the fraction of a task's leading component in D.

    Args:
        found: of the merged update D on all tasks' singular vectors.
        s: (r,) singular values of the task, not all 0.
        block: the task's columns.

    Source:
        this project: the summand of one task in a(D), see dirmerge.methods.scale.
    """
    s = s.double()
    return float((s * found.diagonal[block]).sum() / s.square().sum())


def energy_outside_etf(delta: Delta, frame: Tensor, signs: Tensor) -> float:
    """Computes ‖D − P D‖_F / ‖D‖_F, P the projector on the range of the simplex ETF on a frame.

    With M = √(K/(K−1)) Q (I − 11ᵀ/K), whose columns are turned by `signs`, range(M) is span(Q) without the
    direction Q·signs, so P D = Q C QᵀD with C = I − signs signsᵀ/K.

    Args:
        delta: (m, n) D; of D = Q diag(s) Rᵀ on a full frame the result is 1/√K whatever the tasks are.
        frame: (m, K) orthonormal columns Q; columns of zeros (directions that are not spanned) are allowed.
        signs: (K,) ±1.

    Returns:
        In [0, 1]; 0 for a zero matrix.

    Accuracy:
        √ε near 0, the root of a difference: 3e-4 for float32.

    Source:
        MDA, arXiv 2512.00391, the quantity of the generalisation bound.
    """
    dense: Tensor
    if isinstance(delta, LowRank):
        a, b = delta.folded()
        # An orthonormal right side leaves all norms to the left factor.
        dense = a @ torch.linalg.qr(b, mode="r").R.mT
    else:
        dense = delta
    total = float(dense.square().sum(dtype=torch.float64))
    if total == 0:
        return 0.0
    inside = frame.mT @ dense
    inside -= signs.unsqueeze(1) * ((signs @ inside) / len(signs))
    kept = float(inside.square().sum(dtype=torch.float64))
    return math.sqrt(max(0.0, 1 - kept / total))


@dataclass(frozen=True)
class SignConflicts:
    """Where T deltas disagree in sign.

    Attributes:
        share: of the entries that any task changes, those that one raises and another lowers.
        chance: the same expected of independent fair signs, the mean of 1 − 2^(1−c) over the entries, c the
            tasks that change one.
        opposed: share of the total magnitude Σ_t |D_t| that opposes the sign of the sum, in [0, ½].
        opposed_by_task: the same of each task's own magnitude; 0 for a zero task.
    """

    share: float
    chance: float
    opposed: float
    opposed_by_task: list[float]


def sign_conflicts(blocks: Iterable[Tensor]) -> SignConflicts:
    """Computes how often and how heavily T deltas disagree in sign, block by block of their rows.

    Args:
        blocks: tensors (T, rows, n), the same rows of all deltas, which together are the deltas.

    Returns:
        The shares; 0 where no task changes anything. Independent Gaussian entries of equal size have
        opposed = ½ (1 − 1/√T).

    Source:
        Yadav et al., TIES-Merging, NeurIPS 2023 (sign conflicts, elected sign).
    """
    conflicts: Tensor | int = 0
    entries: Tensor | int = 0
    against: Tensor | float = 0.0
    magnitude: Tensor | float = 0.0
    for block in blocks:
        positive, negative = (block > 0).sum(0), (block < 0).sum(0)
        conflicts = conflicts + ((positive > 0) & (negative > 0)).sum()
        # Entries by the number of tasks that change them.
        entries = entries + torch.bincount((positive + negative).flatten(), minlength=len(block) + 1)
        total = block.sum(0, dtype=torch.float64)
        sizes = block.abs()
        magnitude = magnitude + sizes.sum((1, 2), dtype=torch.float64)
        # Where the sum is 0 both halves oppose each other: each counts half.
        sizes = torch.where(total == 0, 0.5 * sizes, sizes * (block * total.sign() < 0))
        against = against + sizes.sum((1, 2), dtype=torch.float64)
    counts = [0] if isinstance(entries, int) else entries.cpu().tolist()
    changed, conflicting = sum(counts[1:]), int(conflicts)
    expected = sum(count * (1 - 2.0 ** (1 - c)) for c, count in enumerate(counts) if c)
    if changed == 0 or isinstance(against, float) or isinstance(magnitude, float):
        tasks = 0 if isinstance(against, float) else len(against)
        return SignConflicts(0.0, 0.0, 0.0, [0.0] * tasks)
    by_task = against / magnitude.where(magnitude > 0, torch.ones_like(magnitude))
    opposed = float(against.sum() / magnitude.sum())
    return SignConflicts(conflicting / changed, expected / changed, opposed, by_task.cpu().tolist())


def accumulation(total: Tensor, tasks: Sequence[Tensor], count: int = 8) -> list[float]:
    """Computes σ_i(Σ_t D_t) over the i-th largest singular value of all tasks: spectral over-accumulation.

    The reference is the spectrum of the sum if the tasks were orthogonal to each other: then every ratio is
    1. The first ratio is up to T where T tasks share their leading direction, which is counted T times.

    Args:
        total: singular values of the sum (or of a merged update), descending.
        tasks: per task its singular values, at least the `count` leading ones or all it has.
        count: at most so many ratios.

    Returns:
        Ratios for i = 1, 2, …, as far as the tasks have directions; empty if none has one.

    Source:
        Li et al., When Shared Knowledge Hurts, arXiv 2602.05536 (the notion; the ratio is ours).
    """
    pooled = torch.cat([s.double() for s in tasks]).sort(descending=True).values if tasks else total[:0]
    pairs = zip(total.double()[:count].tolist(), pooled[:count].tolist(), strict=False)
    return [value / largest for value, largest in pairs if largest > 0]
