"""Orthogonal polar factors and what follows from them: Procrustes rotations, roots of Gram matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.arrays import of_any_kind
from dirmerge.linalg import minimax
from dirmerge.linalg._common import eigh, finite, numerical_rank, working
from dirmerge.linalg.conditions import holds, is_deferred

PolarMethod = Literal["auto", "exact", "newton_schulz"]

# Relative singular value (float32 input) above which the Gram matrix in float64 gives the polar factor to
# float32 accuracy.
GRAM_CONDITION = 1e-5
# Up to this min(m, k) a Gram matrix is decomposed in float64.
GRAM_DOUBLE_UP_TO = 256
# Newton–Schulz steps after the schedule where no residual is read: within 0.3 of 1 three are enough.
LOCAL_STEPS = 4
# Below this min(m, k) LAPACK's SVD is as fast as the Gram form.
GRAM_FROM = 128
# Relative singular value that separates, in float32, what the Gram matrix resolves from what it does not.
GRAM_SPLIT = 0.03
# Difference of two squared column norms, relative to those at the split, below which they count as equal.
GRAM_NEAR = 0.01


@dataclass(frozen=True, eq=False)
class Polar:
    """The orthogonal polar factor and how it was found.

    Attributes:
        q: (..., m, k): orthonormal columns if m >= k, else orthonormal rows.
        method: "svd", "gram" (eigendecomposition of the Gram matrix) or "newton_schulz".
        steps: polynomial steps made, 0 for the direct forms.
        residual: (...,) ‖qᵀq − I‖_F / √k (with the smaller Gram matrix).
        rank: (...,) int64, numerical rank of x; below min(m, k) the factor is not unique. Like the residual
            on the CPU, unless decisions are deferred (see `conditions`): then on the device of x.
        fallback: why a requested or chosen form gave way to another; None if it did not.
    """

    q: Tensor
    method: Literal["svd", "gram", "newton_schulz"]
    steps: int
    residual: Tensor
    rank: Tensor
    fallback: str | None


@of_any_kind
def polar(
    x: Tensor,
    method: PolarMethod = "auto",
    *,
    tolerance: float | None = None,
    max_steps: int = 24,
    complete: bool = True,
) -> Polar:
    """Computes the orthogonal polar factor P Qᵀ of x = P Σ Qᵀ: the nearest matrix with orthonormal columns.

    Exact: from the eigendecomposition of the Gram matrix xᵀx, in float64 for small or tall float32 inputs,
    in float32 with a first-order correction for large ones; the SVD for float64 and for small inputs; where
    decisions are deferred (see `conditions`) in float64 for all float32 inputs. Newton–Schulz: minimax
    quintic steps, then quintic Newton–Schulz steps (GEMM only); for m >= 2 k the first ones act on the k × k
    Gram matrix and x is multiplied once.

    Args:
        x: (..., m, k) floating point; for m < k the transposed problem is solved.
        method: "exact", "newton_schulz", or "auto": the fastest measured form, exact on a CPU; on a GPU
            Newton–Schulz above min(m, k) = 1024 where x is not nearly square.
        tolerance: of ‖qᵀq − I‖_F / √k for Newton–Schulz; default 1e-5 (float32), 1e-12 (float64).
        max_steps: of Newton–Schulz before it gives way to the exact form.
        complete: whether directions outside the numerical range of x are completed to orthonormal ones
            (arbitrary but orthonormal); if not, they stay zero and q is the canonical partial isometry.

    Returns:
        Polar; `fallback` says so when a form did not reach its accuracy and another one was used.

    Raises:
        ValueError: for wrong shapes or values, NaN or Inf.

    Accuracy:
        Exact: as LAPACK's SVD in the same dtype or better; the error against float64 is about ε over the
        smallest singular value's ratio, which is the condition of the problem. Newton–Schulz: orthogonal to
        `tolerance`, measured.

    Source:
        Higham, Functions of Matrices (2008), ch. 8; minimax steps: Amsel et al., The Polar Express, arXiv
        2505.16932.
    """
    if method not in ("auto", "exact", "newton_schulz"):
        raise ValueError(f"method must be 'auto', 'exact' or 'newton_schulz', got {method!r}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    x = finite(working(x))
    if tolerance is None:
        tolerance = 1e-5 if x.dtype == torch.float32 else 1e-12
    elif not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
    if x.shape[-2] < x.shape[-1]:
        wide = polar(x.mT, method, tolerance=tolerance, max_steps=max_steps, complete=complete)
        return Polar(wide.q.mT, wide.method, wide.steps, wide.residual, wide.rank, wide.fallback)
    m, k = x.shape[-2:]
    if x.numel() == 0:
        ones = x.new_zeros(x.shape[:-2], dtype=torch.float64)
        return Polar(x.clone(), "svd", 0, ones, ones.long(), None)
    # The steps are GEMMs alone, which a GPU runs many times faster than an eigensolver; nearly square x has
    # small singular values that an iteration would not reach.
    is_iterated = method == "newton_schulz" or (method == "auto" and x.is_cuda and k > 1024 and k <= 0.6 * m)
    if not is_iterated:
        return _polar_exact(x, complete, None)
    q, steps, residual = _newton_schulz(x, tolerance, max_steps)
    if holds(residual <= tolerance):
        rank = torch.full(x.shape[:-2], k, dtype=torch.int64, device=residual.device)
        return Polar(q, "newton_schulz", steps, residual, rank, None)
    worst = float(residual.max())
    reason = f"Newton–Schulz reached ‖qᵀq − I‖/√k = {worst:.1e} after {steps} steps, not {tolerance:.1e}"
    return _polar_exact(x, complete, reason)


def orthogonality(q: Tensor) -> Tensor:
    """(...,) float64: ‖qᵀq − I‖_F / √k."""
    return _deviation(q)[1]


def _deviation(q: Tensor) -> tuple[Tensor, Tensor]:
    """qᵀq − I, and ‖qᵀq − I‖_F / √k in float64."""
    deviation = ops.gram(q)
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1)
    rows: Tensor = torch.linalg.vector_norm(deviation, dim=-1)
    return deviation, (rows.double().square().sum(-1) / max(q.shape[-1], 1)).sqrt()


@dataclass(frozen=True, eq=False)
class GramRoot:
    """G^(1/2) and G^(−1/2) of the Gram matrix G = xᵀx; x G^(−1/2) is the polar factor of x.

    Attributes:
        root: (..., k, k) float64, also qᵀx, the Hermitian polar factor.
        inverse: (..., k, k) float64.
        condition: smallest over largest singular value of x, the least of the batch.
    """

    root: Tensor
    inverse: Tensor
    condition: float


@of_any_kind
def gram_root(x: Tensor) -> GramRoot | None:
    """Computes the roots of xᵀx in float64, or None where they would not serve float32 accuracy.

    Args:
        x: (..., m, k) float32 with m >= 2 k for an answer.
    """
    m, k = x.shape[-2:]
    if x.dtype != torch.float32 or m < 2 * k or x.numel() == 0 or k > GRAM_DOUBLE_UP_TO:
        return None
    # The Gram matrix squares the condition number: float32 affords that only for nearly orthogonal columns.
    values, vectors = eigh(ops.gram(x).double())
    if not bool((values[..., 0] > 0.25 * values[..., -1]).all()):
        values, vectors = eigh(ops.gram(x.double()))
    if not bool((values[..., 0] > GRAM_CONDITION**2 * values[..., -1]).all()):
        return None
    scaled = vectors * values.sqrt().unsqueeze(-2)
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return GramRoot(scaled @ vectors.mT, inverse, float((values[..., 0] / values[..., -1]).sqrt().min()))


def _polar_exact(x: Tensor, complete: bool, fallback: str | None) -> Polar:
    m, k = x.shape[-2:]
    if is_deferred(x) and x.dtype == torch.float32:
        return _polar_deferred(x, complete)
    gram = gram_root(x)
    if gram is not None:
        q = (x.double() @ gram.inverse).to(x.dtype)
        rank = torch.full(x.shape[:-2], k, dtype=torch.int64)
        return Polar(q, "gram", 0, orthogonality(q), rank, fallback)
    if x.dtype == torch.float32 and k >= GRAM_FROM:
        found = [_polar_gram(each, complete) for each in x.reshape(-1, m, k)]
        q = torch.stack([each for each, _ in found]).view(x.shape)
        rank = torch.tensor([r for _, r in found]).view(x.shape[:-2])
        deviation, residual = _deviation(q)
        # A partial isometry misses k − rank ones on the diagonal of its Gram matrix.
        expected = torch.zeros_like(residual) if complete else ((k - rank.to(residual)) / k).sqrt()
        limit = _limit(m)
        if not bool(((residual - expected).abs() <= limit / 4).all()):
            # One Newton–Schulz step squares what the first-order correction left of the deviation.
            q = q - 0.5 * (q @ deviation)
            residual = orthogonality(q)
        if bool(((residual - expected).abs() <= limit).all()):
            return Polar(q, "gram", 0, residual, rank, fallback)
        worst = float((residual - expected).abs().max())
        reason = f"the Gram form reached ‖qᵀq − I‖/√k = {worst:.1e}"
        fallback = reason if fallback is None else f"{fallback}; {reason}"
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rank = numerical_rank(s, m)
    if not complete:
        keep = torch.arange(k, device=x.device) < rank.to(x.device).unsqueeze(-1)
        u = u * keep.unsqueeze(-2)
    q = u @ vh
    return Polar(q, "svd", 0, orthogonality(q), rank if is_deferred(x) else rank.cpu(), fallback)


def _polar_deferred(x: Tensor, complete: bool) -> Polar:
    """The polar factor of a float32 matrix (..., m, k), m >= k, without a decision: x V S⁻¹ Vᵀ in float64.

    xᵀx = V S² Vᵀ. Singular values down to the numerical rank's limit ε √m s_1 come from a float64 Gram matrix
    with a relative error of 1e-2 / m at most, in directions that the rounding of x has moved by more.
    """
    m, k = x.shape[-2:]
    double = x.double()
    values, vectors = eigh(ops.gram(double))
    s = values.clamp(min=0).sqrt()
    is_present = s > torch.finfo(x.dtype).eps * math.sqrt(m) * s[..., -1:]
    # The quotient of an absent direction is never used, and not a number where all are absent.
    inverse = torch.where(is_present, 1 / s, 0.0)
    q = (double @ ((vectors * inverse.unsqueeze(-2)) @ vectors.mT)).to(x.dtype)
    rank = is_present.sum(-1)
    if complete:
        holds(rank == k)
    residual = orthogonality(q)
    # A partial isometry misses k − rank ones on the diagonal of its Gram matrix.
    expected = ((k - rank) / k).sqrt()
    holds((residual - expected).abs() <= _limit(m))
    return Polar(q, "gram", 0, residual, rank, None)


def _limit(m: int) -> float:
    """The residual ‖qᵀq − I‖_F / √k that the exact form may leave in float32."""
    return 1e-5 * math.sqrt(max(m / 1024, 1))


def _polar_gram(x: Tensor, complete: bool) -> tuple[Tensor, int]:
    """The polar factor of one float32 matrix (m, k), m >= k, and its numerical rank.

    With the eigenvectors V of xᵀx in float32, w = x V has nearly orthogonal columns of norms d, the better
    the larger they are. Below GRAM_SPLIT · d_max they are turned out of the span of the others, to first
    order, and decomposed by an SVD of their own, which is a thin one. For the others, w = n diag(d) with
    nᵀn = I + E for a small E, the polar factor is n (I − M), M_ij = d_i E_ij / (d_i + d_j), up to O(E²): the
    first-order solution S = D + K of S² = wᵀw, K_ij (d_i + d_j) = d_i E_ij d_j.
    """
    top = float(x.abs().amax())
    if top == 0:
        eye = torch.eye(x.shape[-2], x.shape[-1], dtype=x.dtype, device=x.device)
        return (eye if complete else torch.zeros_like(x)), 0
    # A power of two keeps the squares of huge and tiny entries within float32.
    x = x * 2.0 ** -math.floor(math.log2(top))
    values, v = eigh(ops.gram(x))
    small = int((values < GRAM_SPLIT**2 * values[-1]).sum())
    w = x @ v
    gram = ops.gram(w)
    squares = gram.diagonal()
    w_small, w, v_small, v_large = w[:, :small], w[:, small:], v[:, :small], v[:, small:]
    if small:
        # Between columns of nearly the same norm a turn would be large, and nothing depends on it.
        gap = squares[small:, None] - squares[None, :small]
        turn = gram[small:, :small] * gap / (gap.square() + (GRAM_NEAR * values[small]).square())
        w_small, w = w_small - w @ turn, torch.addmm(w, w_small, turn.mT)
        v_small, v_large = v_small - v_large @ turn, torch.addmm(v_large, v_small, turn.mT)
    d = squares[small:].sqrt()
    error = gram[small:, small:] / d / d.unsqueeze(1)
    error.diagonal().sub_(1)
    n = w / d
    n = torch.addmm(n, n, error * (d.unsqueeze(1) / (d + d.unsqueeze(1))), alpha=-1)
    rank = x.shape[-1]
    if small == 0:
        return n @ v_large.mT, rank
    # The rounding of w reaches into the span of n by ε d_max, which the smallest columns cannot afford.
    w_small = torch.addmm(w_small, n, n.mT @ w_small, alpha=-1)
    basis, r = torch.linalg.qr(w_small)
    u, s, zh = torch.linalg.svd(r)
    cutoff = torch.finfo(x.dtype).eps * math.sqrt(x.shape[-2]) * d.max()
    rank -= int((s <= cutoff).sum())
    if not complete:
        u = u * (s > cutoff)
    return torch.addmm((basis @ u) @ (v_small @ zh.mT).mT, n, v_large.mT), rank


def _newton_schulz(x: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, int, Tensor]:
    k = x.shape[-1]
    # ‖x‖₂ ≤ √(‖x‖₁ ‖x‖_∞), and ≤ ‖x‖_F: a bound within a small factor of the norm, without an SVD.
    bound = (torch.linalg.matrix_norm(x, 1) * torch.linalg.matrix_norm(x, math.inf)).sqrt()
    bound = torch.minimum(bound, torch.linalg.matrix_norm(x)).clamp(min=torch.finfo(x.dtype).tiny)
    y = x / bound[..., None, None]
    schedule = minimax.schedule()[:max_steps]
    if x.shape[-2] >= 2 * k:
        y = y @ _polynomial_of_gram(ops.gram(y), schedule).to(y.dtype)
    else:
        for a, b, c in schedule:
            y = ops.polar_step(y, a, b, c)
    steps = len(schedule)
    if is_deferred(x):
        for _ in range(min(LOCAL_STEPS, max_steps - steps)):
            y = ops.polar_step(y, *minimax.LOCAL)
            steps += 1
        return y, steps, orthogonality(y)
    residual = orthogonality(y)
    while steps < max_steps and bool((residual > tolerance).any()) and bool(residual.isfinite().all()):
        y = ops.polar_step(y, *minimax.LOCAL)
        residual = orthogonality(y)
        steps += 1
    return y, steps, residual.cpu()


def _polynomial_of_gram(gram: Tensor, schedule: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The product of all steps' polynomials in G = xᵀx, so that x times it makes all steps at once.

    In float64: the Gram matrix squares the condition number, which float32 would not afford.
    """
    gram = gram.double()
    product = None
    for a, b, c in schedule:
        step = b * gram + c * (gram @ gram)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        product = step if product is None else product @ step
        gram = step @ gram @ step
    assert product is not None  # a schedule has at least one step
    return product


@of_any_kind
def procrustes(a: Tensor, b: Tensor, *, special: bool = True) -> Tensor:
    """Computes the rotation R = argmin ‖a R − b‖_F over SO(d), or over O(d).

    R = U diag(1, …, 1, det(U Vᵀ)) Vᵀ from the SVD of aᵀb.

    Args:
        a: (..., n, d) points.
        b: (..., n, d) their targets.
        special: whether R must be a rotation (det R = 1); otherwise reflections are allowed too.

    Returns:
        (..., d, d) orthogonal R, in the dtype of the inputs' arithmetic.

    Raises:
        ValueError: for shapes that differ, NaN or Inf.

    Accuracy:
        The SVD runs in float64: orthogonal to the rounding of the returned dtype.

    Source:
        Kabsch, Acta Cryst. A32 (1976); MDA, arXiv 2512.00391, the rotation target of L_rot.
    """
    a, b = finite(working(a, "a"), "a"), finite(working(b, "b"), "b")
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    u, _, vh = torch.linalg.svd(a.double().mT @ b.double())
    if special:
        # Not det, whose product of pivots can underflow where d is large.
        sign = torch.linalg.slogdet(u @ vh).sign
        u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    rotation: Tensor = u @ vh
    return rotation.to(torch.promote_types(a.dtype, b.dtype))
