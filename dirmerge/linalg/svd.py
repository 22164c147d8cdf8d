"""Truncated SVD: exact by the smaller Gram matrix or LAPACK, randomized by a range finder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.arrays import of_any_kind
from dirmerge.linalg import cost
from dirmerge.linalg._common import MatrixLike, eigh, finite, orthonormal, working
from dirmerge.linalg.conditions import holds, is_deferred
from dirmerge.ops.delta_sketch import random_signs

SVDMethod = Literal["auto", "exact", "randomized"]

# Adaptive power iterations stop here at the latest; on the spectra of fine-tuning deltas two or three are
# enough.
MAX_POWER_ITERATIONS = 8
# Least sine of the angle of a column of the iterated sketch to those before it for which one pass of
# CholeskyQR does, by the dtype of its Gram matrix.
DEPENDENCE = {torch.float32: 0.05, torch.float64: 1e-3}
# Where decisions are deferred, as many power iterations are made whatever they gain; of a flat spectrum the
# most of the adaptive form.
DEFERRED_POWER_ITERATIONS = 3
# Least kept eigenvalue of a float32 Gram matrix, relative to the largest, that float32 resolves well enough:
# singular values down to 1/50. Below, the Gram matrix and its eigenvectors are computed in float64.
GRAM_SINGLE_RATIO = 4e-4
# Above this width, relative to min(m, n), LAPACK's SVD of the whole is as fast as the float64 Gram matrix and
# the SVD of a projection.
RITZ_UP_TO = 0.6
# A matrix is headed where its energy would fill fewer equal directions than this part of min(m, n). A
# Gaussian matrix fills half of them if square, more if not.
HEADED = 0.25
# Directions that a head is looked for in, power iterations for it, and how far above the last of them a
# direction must stand to belong to it.
HEAD, HEAD_ITERATIONS, HEAD_GAP = 64, 6, 3.0
# Steps of first order that are made at most.
TURNS = 3
# Tangent up to which a pair of columns is turned though its product is at the level of rounding.
TURN_NEAR = 0.05
# What a step must reach: norm of vᵀv − I, of which the correction leaves the cube; largest entry of
# uᵀu − I; and the error of u diag(s) vᵀ, relative to its norm, before u is made orthonormal.
TURN_SKEW, TURN_OFF, TURN_ERROR = 1e-2, 2e-5, 3e-6


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
    with random signs, power iterations re-orthogonalised by CholeskyQR (with the smaller Gram matrix where m
    and n differ much), SVD of the projected matrix.

    Args:
        a: (..., m, n) floating point, bf16 and fp16 are computed in float32; or a `MatrixLike` such
            as a Difference ([T,] m, n), which is multiplied as it is read.
        rank: number of triplets r, 1 <= r; cut to min(m, n).
        method: "exact", "randomized", or "auto": exact up to min(m, n) = 512, else the form that costs
            less by measured rates (`dirmerge.linalg.cost`): the randomized one up to r of about half of
            min(m, n), whatever the spectrum.
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
    is_single = a.dtype == torch.float32
    if rank == 0 or 0 in a.shape:
        form: cost.Form = "lapack"
    elif method == "auto":
        form = cost.cheapest_form(m, n, rank, is_single=is_single)
    else:
        form = "randomized" if method == "randomized" else cost.exact_form(m, n, rank, is_single=is_single)
    if form == "lapack":
        return _svd_lapack(a if isinstance(a, Tensor) else a.dense(), rank)
    if form == "gram":
        tall = _svd_gram(a if m >= n else a.mT, rank)
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


def _svd_gram(a: Tensor | MatrixLike, rank: int) -> TruncatedSVD:
    """The exact form for m >= n: by a float32 Gram matrix where that suffices, else by a float64 one.

    Where decisions are deferred, float64: it serves every spectrum.
    """
    total = None
    if not is_deferred(a.device):
        found, total = _svd_gram_single(a, rank)
        if found is not None:
            return found
    width = rank + max(cost.OVERSAMPLING, rank // 2)
    if width > RITZ_UP_TO * a.shape[-1]:
        return _svd_lapack(a if isinstance(a, Tensor) else a.dense(), rank)
    gram, found_total = _gram(a, torch.float64)
    total = found_total if total is None else total
    if not holds((total > 1e-20) & (total < 1e20)):
        return _svd_lapack(a if isinstance(a, Tensor) else a.dense(), rank)
    block = eigh(gram)[1][..., -width:].to(torch.float32).flip(-1)
    del gram
    q, _ = orthonormal(a @ block)
    u, s, v = _triplets(q, a.mT @ q, rank)
    return TruncatedSVD(u, s, v, total, "exact", 0, torch.zeros_like(total))


def _svd_gram_single(a: Tensor | MatrixLike, rank: int) -> tuple[TruncatedSVD | None, Tensor]:
    """The exact form for m >= n by a float32 Gram matrix, or None where that does not suffice; and ‖a‖²_F.

    The eigenvectors of a float32 Gram matrix are accurate to ε s_1² over the difference of eigenvalues. Two
    steps take the error out: a few much larger directions are weighted down first, and the eigenvectors are
    then turned until a v has orthogonal columns.
    """
    n = a.shape[-1]
    gram, total = _gram(a, torch.float32)
    if not holds((total > 1e-20) & (total < 1e20)):
        # Squares of such entries leave float32, and zero has no directions: LAPACK scales.
        return _svd_lapack(a if isinstance(a, Tensor) else a.dense(), rank), total
    # (Σ s²)² / Σ s⁴: how many equal directions would have this much spread.
    directions = total.square() / gram.double().square().sum((-2, -1))
    if bool((directions < HEADED * n).any()):
        gram = _without_head(a if isinstance(a, Tensor) else a.dense(), gram)
    values, vectors = eigh(gram)
    del gram
    if bool((values[..., -rank] > GRAM_SINGLE_RATIO * values[..., -1]).all()):
        triplets = _turned(a, vectors[..., -cost.turn_width(n, rank) :].flip(-1), rank)
        if triplets is not None:
            return TruncatedSVD(*triplets, total, "exact", 0, torch.zeros_like(total)), total
    return None, total


def _without_head(a: Tensor, gram: Tensor) -> Tensor:
    """Returns the Gram matrix of a with less weight on directions far above the rest.

    The directions stay eigenvectors, and the first ones in the same order. The rounding of the product is
    then relative to the rest instead of to s_1².
    """
    n = gram.shape[-1]
    x = random_signs(n, HEAD, 0, dtype=gram.dtype, device=gram.device)
    for _ in range(HEAD_ITERATIONS):
        x, _ = orthonormal(gram @ x)
    values, w = eigh(x.mT @ (gram @ x))
    limit = torch.maximum(HEAD_GAP**2 * values[..., :1], GRAM_SINGLE_RATIO * values[..., -1:])
    q = (x @ w) * (values > limit).unsqueeze(-2)
    rest = a - (a @ q) @ q.mT
    weights = limit * torch.linspace(1.25, 2, HEAD, dtype=gram.dtype, device=gram.device)
    return ops.gram(rest) + (q * weights.unsqueeze(-2)) @ q.mT


def _turned(a: Tensor | MatrixLike, v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The leading triplets from approximate right singular vectors v (n, w), of which the first are kept.

    Jacobi's rotations, of all pairs at once and to first order, make the kept columns of a v orthogonal to
    all others.

    Returns:
        (u, s, v), or None where the columns of a v are not orthogonal to rounding after three steps.

    Source:
        Ogita, Aishima, Japan J. Indust. Appl. Math. 35 (2018) (the same step for symmetric matrices).
    """
    y = a @ v
    kept_v, kept = v[..., :rank], y[..., :rank]
    products, squares = y.mT @ kept, y.square().sum(-2)
    for _ in range(TURNS):
        turn = _pairwise_turn(products, squares)
        kept_v, kept = kept_v + v @ turn, kept + y @ turn
        norms = torch.linalg.vector_norm(kept_v, dim=-2, keepdim=True)
        kept_v, kept = kept_v / norms, kept / norms
        error = _deviation(kept_v)
        is_orthogonal = torch.linalg.matrix_norm(error) < TURN_SKEW
        polish = error / 2 - 0.375 * (error @ error)
        v, y = kept_v - kept_v @ polish, kept - kept @ polish
        s = torch.linalg.vector_norm(y, dim=-2)
        u = y / s.unsqueeze(-2)
        error = _deviation(u)
        # Of two columns the one with the smaller singular value gives way, which changes the product least.
        squares = s.square()
        polish = error * squares.unsqueeze(-1) / (squares.unsqueeze(-1) + squares.unsqueeze(-2))
        off = torch.linalg.matrix_norm(polish * s.unsqueeze(-2)) / torch.linalg.vector_norm(s, dim=-1)
        is_orthogonal &= (error.abs().amax((-2, -1)) < TURN_OFF) & (off < TURN_ERROR)
        if bool(is_orthogonal.all()):
            u = u - u @ polish
            s, order = s.sort(dim=-1, descending=True)
            order = order.unsqueeze(-2)
            return u.take_along_dim(order, -1), s, v.take_along_dim(order, -1)
        # What a step leaves is of second order; among the kept columns alone, the next one costs less.
        kept_v, kept = v, y
        products = error * s.unsqueeze(-1) * s.unsqueeze(-2)
    return None


def _pairwise_turn(products: Tensor, squares: Tensor) -> Tensor:
    """The tangents that rotate pairs of columns, of given products (w, r) and squared norms (w), apart."""
    w, r = products.shape[-2:]
    gap = squares[..., None, :r] - squares[..., :, None]
    ahead = torch.ones(w, r, dtype=torch.bool, device=gap.device).triu()
    root = (gap.square() + 4 * products.square()).sqrt()
    turn = 2 * products / torch.where((gap < 0) | ((gap == 0) & ahead), gap - root, gap + root)
    # Between columns of nearly the same norm that are orthogonal to rounding, any turn is as good as none.
    scale = (squares[..., :, None] * squares[..., None, :r]).sqrt()
    is_needed = (turn.abs() < TURN_NEAR) | (products.abs() > TURN_OFF / 4 * scale)
    turn = torch.where(is_needed, turn, torch.zeros_like(turn))
    turn.diagonal(dim1=-2, dim2=-1).zero_()
    return turn


def _deviation(q: Tensor) -> Tensor:
    """Computes qᵀq − I."""
    error = ops.gram(q)
    error.diagonal(dim1=-2, dim2=-1).sub_(1)
    return error


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
    """The randomized form for m >= n: power iterations with a itself, or with aᵀa where that costs less."""
    m, n = a.shape[-2:]
    width = min(rank + cost.OVERSAMPLING, m, n)
    limit = MAX_POWER_ITERATIONS if power_iterations is None else power_iterations
    is_adaptive = not is_deferred(a.device)
    if limit > 1 and is_adaptive and cost.iterates_by_gram(m, n, rank):
        enough = tolerance if power_iterations is None else -1.0
        found = _iterated_by_gram(a, rank, width, seed, limit, enough)
        if found is not None:
            return found
    if isinstance(a, Tensor):
        y = a @ random_signs(n, width, seed, dtype=a.dtype, device=a.device)
        total = _energy(a)
    else:
        y, total = a.sketch(width, seed)
    q, precision = _basis(y, y.dtype) if is_adaptive else (orthonormal(y)[0], None)
    z = a.mT @ q
    captured, done = _energy(z), 0
    gain = torch.ones_like(captured)
    if power_iterations is None and not is_adaptive:
        done = MAX_POWER_ITERATIONS if is_flat else DEFERRED_POWER_ITERATIONS
        q, z, gain = _iterated(a, q, z, done, tolerance)
        holds(gain <= tolerance)
        u, s, v = _triplets(q, z, rank)
        return TruncatedSVD(u, s, v, total, "randomized", done, gain)
    while done < limit:
        # Columns far from dependent stay so when a is applied twice: then one basis per iteration does.
        basis = orthonormal(z)[0] if precision is None else z / _size(z)
        q, precision = _basis(a @ basis, precision)
        z = a.mT @ q
        before, captured, done = captured, _energy(z), done + 1
        gain = _gain(before, captured)
        if power_iterations is None and bool((gain <= tolerance).all()):
            break
    if precision is not None:
        # The second pass of CholeskyQR, once for all iterations.
        r = torch.linalg.cholesky(ops.gram(q)).mT
        q, z = (torch.linalg.solve_triangular(r, x, upper=True, left=False) for x in (q, z))
    u, s, v = _triplets(q, z, rank)
    return TruncatedSVD(u, s, v, total, "randomized", done, gain)


def _iterated_by_gram(
    a: Tensor | MatrixLike, rank: int, width: int, seed: int, limit: int, tolerance: float
) -> TruncatedSVD | None:
    """The randomized form by the smaller Gram matrix, or None where that would lose directions to rounding.

    The subspace is that of as many iterations with a. Energies are those of the right subspaces v, which the
    last products with a only add to.
    """
    gram, total = _gram(a, a.dtype)
    if not bool(((total > 1e-20) & (total < 1e20)).all()):
        return None
    y = gram @ random_signs(gram.shape[-1], width, seed, dtype=gram.dtype, device=gram.device)
    v, precision = _basis(y, y.dtype)
    captured, gain, done = torch.zeros_like(total), torch.ones_like(total), 1
    while precision is not None:
        y = gram @ v
        before, captured = captured, torch.linalg.vecdot(v, y, dim=-2).double().sum(-1)
        gain = _gain(before, captured)
        if done == limit or bool((gain <= tolerance).all()):
            q, _ = orthonormal(a @ v)
            return TruncatedSVD(*_triplets(q, a.mT @ q, rank), total, "randomized", done, gain)
        v, precision = _basis(y, precision)
        done += 1
    return None


def _gain(before: Tensor, captured: Tensor) -> Tensor:
    """The relative energy that an iteration added."""
    return ((captured - before) / captured.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0.0)


def _basis(y: Tensor, precision: torch.dtype | None) -> tuple[Tensor, torch.dtype | None]:
    """Computes a basis of the columns of y, and the dtype of the Gram matrix it took.

    One pass of CholeskyQR in the least precision from the given one on that leaves the basis orthonormal to
    about 1e-4; None stands for an orthonormal basis of columns that are nearly dependent.
    """
    for dtype, limit in DEPENDENCE.items():
        if precision is None or (precision == torch.float64 and dtype == torch.float32):
            continue
        factor, info = torch.linalg.cholesky_ex(ops.gram(y.to(dtype)))
        sines = factor.diagonal(dim1=-2, dim2=-1) / torch.linalg.vector_norm(factor, dim=-1)
        # A norm of 0 makes a NaN, which is not above the limit either.
        if bool(((info == 0) & (sines > limit).all(-1)).all()):
            return torch.linalg.solve_triangular(factor.mT.to(y.dtype), y, upper=True, left=False), dtype
    return orthonormal(y)[0], None


def _size(x: Tensor) -> Tensor:
    """The largest magnitude (..., 1, 1), or 1 for zeros."""
    size = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, torch.ones_like(size))


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
    """Estimates the work of a truncated SVD in float32, in FLOPs of a GEMM that take as long."""
    rank = min(rank, m, n)
    if method == "randomized":
        return cost.randomized_cost(m, n, rank)
    find = cost.exact_form if method == "exact" else cost.cheapest_form
    return cost.form_cost(m, n, rank, find(m, n, rank, is_single=True))
