"""Truncated SVD: exact by the smaller Gram matrix or LAPACK, randomized by a range finder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.arrays import of_any_kind
from dirmerge.linalg._common import MatrixLike, eigh, finite, orthonormal, working
from dirmerge.linalg.conditions import holds, is_deferred
from dirmerge.ops.delta_sketch import random_signs

SVDMethod = Literal["auto", "exact", "randomized"]

# Up to this min(m, n) an exact decomposition costs less than a second on two cores, so "auto" has no reason
# to approximate.
EXACT_UP_TO = 1024
OVERSAMPLING = 16
# Adaptive power iterations stop here at the latest; on the spectra of fine-tuning deltas two or three are
# enough.
MAX_POWER_ITERATIONS = 8
# Where decisions are deferred, as many power iterations are made whatever they gain; of a flat spectrum the
# most of the adaptive form.
DEFERRED_POWER_ITERATIONS = 3
# Below this min(m, n) LAPACK's SVD is as fast as the Gram form.
GRAM_FROM = 192
# Least kept eigenvalue of a float32 Gram matrix, relative to the largest, that float32 resolves well enough:
# singular values down to 1/50. Below, the Gram matrix and its eigenvectors are computed in float64.
GRAM_SINGLE_RATIO = 4e-4


@dataclass(frozen=True, eq=False)
class TruncatedSVD:
    """The r leading singular triplets of a batch of matrices, with a certificate.

    Attributes:
        u: (..., m, r) left singular vectors, orthonormal columns.
        s: (..., r) singular values, descending.
        v: (..., n, r) right singular vectors, orthonormal columns.
        total: (...,) float64, ‖a‖²_F.
        method: "exact" or "randomized".
        power_iterations: of the randomized form; 0 for the exact one.
        gain: (...,) float64, the relative energy that the last power iteration added: what is still missing
            to the best possible energy at this rank is of this size or below. 0 for the exact form, 1 where
            no iteration was made.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    total: Tensor
    method: Literal["exact", "randomized"]
    power_iterations: int
    gain: Tensor

    @property
    @of_any_kind
    def energy(self) -> Tensor:
        """(...,) float64: captured energy Σ s² / ‖a‖²_F; 1 for a zero matrix."""
        captured = self.s.double().square().sum(-1)
        return torch.where(self.total > 0, (captured / self.total).clamp(max=1.0), torch.ones_like(captured))

    @property
    @of_any_kind
    def residual(self) -> Tensor:
        """(...,) float64: ‖a − u s vᵀ‖_F, from ‖a‖²_F − Σ s² (accurate to about 3e-4 ‖a‖_F in float32)."""
        return (self.total - self.s.double().square().sum(-1)).clamp(min=0).sqrt()

    @property
    def rank(self) -> int:
        """The number of triplets r."""
        return self.s.shape[-1]

    def truncated(self, rank: int) -> TruncatedSVD:
        """Returns the leading `rank` triplets, same certificate base."""
        return TruncatedSVD(
            self.u[..., :rank], self.s[..., :rank], self.v[..., :rank], self.total, self.method,
            self.power_iterations, self.gain,
        )  # fmt: skip

    @of_any_kind
    def unbind(self) -> list[TruncatedSVD]:
        """Returns the decompositions of the first batch dimension, one by one."""
        parts = zip(self.u, self.s, self.v, self.total, self.gain, strict=True)
        return [
            TruncatedSVD(u, s, v, total, self.method, self.power_iterations, gain)
            for u, s, v, total, gain in parts
        ]

    @of_any_kind
    def dense(self) -> Tensor:
        """Returns (..., m, n): u diag(s) vᵀ."""
        return (self.u * self.s.unsqueeze(-2)) @ self.v.mT


@of_any_kind
def svd_truncated(
    a: Tensor | MatrixLike,
    rank: int,
    method: SVDMethod = "auto",
    *,
    seed: int = 0,
    power_iterations: int | None = None,
    tolerance: float = 1e-2,
    is_flat: bool = False,
) -> TruncatedSVD:
    """Computes the leading singular triplets a ≈ u diag(s) vᵀ of every matrix of a batch.

    Exact: eigenvectors of the smaller Gram matrix, then a Rayleigh–Ritz step on a itself with half as many
    directions again; LAPACK's SVD for float64, small matrices and ranks near min(m, n). Randomized: sketch
    with random signs, power iterations re-orthogonalised by CholeskyQR, SVD of the projected matrix.

    Args:
        a: (..., m, n) floating point, bf16 and fp16 are computed in float32; or a `MatrixLike` such
            as a Difference ([T,] m, n), which is multiplied as it is read.
        rank: number of triplets r, 1 <= r; cut to min(m, n).
        method: "exact", "randomized", or "auto": exact up to min(m, n) = 1024 and where r comes close to
            min(m, n).
        seed: of the sketch, from 0 to 2⁶³ − 1; equal seeds give equal results.
        power_iterations: of the randomized form; None adds them until one gains less than `tolerance` (at
            least one, at most 8).
        tolerance: relative energy that the last power iteration may still gain.
        is_flat: whether a flat spectrum is expected, which needs more iterations. It matters only where
            decisions are deferred (see `conditions`) and their number is fixed beforehand: 8 instead of 3.

    Returns:
        TruncatedSVD with the energy captured, the residual and the last iteration's gain per matrix.

    Raises:
        ValueError: for wrong shapes or values, NaN or Inf.

    Accuracy:
        Exact: singular values and the product u diag(s) vᵀ to 1e-5 (float32), where the spectrum separates
        the kept directions as far as float32 can tell; LAPACK's in float64. Randomized: `energy` and
        `residual` are measured, not estimated.

    Source:
        Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1; Golub, Van Loan, Matrix
        Computations, section 8.6 (SVD by the Gram matrix).
    """
    if method not in ("auto", "exact", "randomized"):
        raise ValueError(f"method must be 'auto', 'exact' or 'randomized', got {method!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if power_iterations is not None and power_iterations < 0:
        raise ValueError(f"power_iterations must be at least 0, got {power_iterations}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
    if isinstance(a, Tensor) or not isinstance(a, MatrixLike):
        a = finite(working(a, "a"), "a")
    m, n = a.shape[-2:]
    p = min(m, n)
    rank = min(rank, p)
    is_small = p <= EXACT_UP_TO or rank + OVERSAMPLING > 0.6 * p
    if method == "exact" or (method == "auto" and is_small) or rank == 0:
        width = rank + max(OVERSAMPLING, rank // 2)
        if p < GRAM_FROM or a.dtype != torch.float32 or width > 0.6 * p or 0 in a.shape:
            return _svd_lapack(a if isinstance(a, Tensor) else a.dense(), rank)
        tall = _svd_gram(a if m >= n else a.mT, rank, width)
    else:
        tall = _svd_randomized(a if m >= n else a.mT, rank, seed, power_iterations, tolerance, is_flat)
    if m >= n:
        return tall
    return TruncatedSVD(
        tall.v, tall.s, tall.u, tall.total, tall.method, tall.power_iterations, tall.gain
    )  # fmt: skip


def _energy(a: Tensor) -> Tensor:
    """‖a‖²_F without a float64 copy of a larger a: row norms in its dtype, summed in float64."""
    if a.numel() <= 1 << 20:
        return a.double().square().sum((-2, -1))
    norms: Tensor = torch.linalg.vector_norm(a, dim=-1)
    return norms.double().square().sum(-1)


def _svd_lapack(a: Tensor, rank: int) -> TruncatedSVD:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    total = _energy(a)
    # A view would keep the full factors alive, which are T times larger.
    return TruncatedSVD(
        u[..., :rank].contiguous(), s[..., :rank].contiguous(), vh.mT[..., :rank].contiguous(),
        total, "exact", 0, torch.zeros_like(total),
    )  # fmt: skip


def _gram(a: Tensor | MatrixLike, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """aᵀa and ‖a‖²_F."""
    if isinstance(a, Tensor):
        return ops.gram(a.to(dtype)), _energy(a)
    return a.gram(dtype)


def _svd_gram(a: Tensor | MatrixLike, rank: int, width: int) -> TruncatedSVD:
    """The exact form for m >= n.

    The eigenvectors of a float32 Gram matrix are accurate to ε s_1² over the difference of eigenvalues. The
    Rayleigh–Ritz step on a takes that out among the `width` directions it works on, so that what is left is
    the error against directions well below the kept ones.
    """
    # Where decisions are deferred, float64: it serves every spectrum.
    is_double = is_deferred(a.device)
    gram, total = _gram(a, torch.float64 if is_double else torch.float32)
    if not holds((total > 1e-20) & (total < 1e20)):
        # Squares of such entries leave float32, and zero has no directions: LAPACK scales.
        return _svd_lapack(a if isinstance(a, Tensor) else a.dense(), rank)
    values, vectors = eigh(gram)
    if not is_double and not bool((values[..., -rank] > GRAM_SINGLE_RATIO * values[..., -1]).all()):
        del vectors
        gram, total = _gram(a, torch.float64)
        values, vectors = eigh(gram)
    del gram
    block = vectors[..., -width:].to(torch.float32).flip(-1)
    del vectors
    q, _ = orthonormal(a @ block)
    u, s, v = _triplets(q, a.mT @ q, rank)
    return TruncatedSVD(u, s, v, total, "exact", 0, torch.zeros_like(total))


def _triplets(q: Tensor, z: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of q zᵀ for orthonormal q: those of the small factor of z = q_z r."""
    qz, r = orthonormal(z)
    uz, s, vzh = torch.linalg.svd(r.mT, full_matrices=False)
    return q @ uz[..., :rank], s[..., :rank].contiguous(), qz @ vzh.mT[..., :rank]


def _svd_randomized(
    a: Tensor | MatrixLike,
    rank: int,
    seed: int,
    power_iterations: int | None,
    tolerance: float,
    is_flat: bool,
) -> TruncatedSVD:
    m, n = a.shape[-2:]
    width = min(rank + OVERSAMPLING, m, n)
    if isinstance(a, Tensor):
        y = a @ random_signs(n, width, seed, dtype=a.dtype, device=a.device)
        total = _energy(a)
    else:
        y, total = a.sketch(width, seed)
    q, _ = orthonormal(y)
    z = a.mT @ q
    captured, done = _energy(z), 0
    gain = torch.ones_like(captured)
    if power_iterations is None and is_deferred(z):
        done = MAX_POWER_ITERATIONS if is_flat else DEFERRED_POWER_ITERATIONS
        q, z, gain = _iterated(a, q, z, done, tolerance)
    limit = MAX_POWER_ITERATIONS if power_iterations is None else power_iterations
    while done < limit and not (power_iterations is None and done and holds(gain <= tolerance)):
        basis, _ = orthonormal(z)
        q, _ = orthonormal(a @ basis)
        z = a.mT @ q
        before, captured, done = captured, _energy(z), done + 1
        gain = _gain(before, captured)
    u, s, v = _triplets(q, z, rank)
    return TruncatedSVD(u, s, v, total, "randomized", done, gain)


def _gain(before: Tensor, after: Tensor) -> Tensor:
    """The relative energy that a power iteration added."""
    return ((after - before) / after.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0.0)


def _iterated(
    a: Tensor | MatrixLike, q: Tensor, z: Tensor, count: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes `count` power iterations; a matrix stays as it is after one that gained `tolerance` or less."""
    captured = _energy(z)
    gain = torch.ones_like(captured)
    for _ in range(count):
        basis, _ = orthonormal(z)
        next_q, _ = orthonormal(a @ basis)
        next_z = a.mT @ next_q
        after = _energy(next_z)
        goes_on = gain > tolerance
        gain = torch.where(goes_on, _gain(captured, after), gain)
        captured = torch.where(goes_on, after, captured)
        q = torch.where(goes_on[..., None, None], next_q, q)
        z = torch.where(goes_on[..., None, None], next_z, z)
    return q, z, gain


def svd_flops(m: int, n: int, rank: int, method: SVDMethod) -> float:
    """Estimates the FLOPs of a truncated SVD: the Gram form's eigenproblem, or six passes of width r + 16."""
    p = min(m, n)
    if method == "exact" or p <= EXACT_UP_TO or rank + OVERSAMPLING > 0.6 * p:
        return 2.0 * m * n * p + 11.0 * p**3
    return 12.0 * m * n * (rank + OVERSAMPLING)
