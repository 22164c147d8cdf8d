"""jacobi_svd: the singular value decomposition of every small matrix of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dirmerge import cuda
from dirmerge.backends import implements
from dirmerge.ops._registration import check_floating, compute_dtype, register

SMALL = 128
"""The largest min(m, n) that jacobi_svd takes, and the largest n of jacobi_eigh."""


class JacobiSVD(NamedTuple):
    """The decomposition u diag(s) vᵀ of matrices, and the Jacobi sweeps that each took."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor
    sweeps: torch.Tensor


def _check(a: torch.Tensor) -> None:
    check_floating("jacobi_svd", a=a)
    if a.dim() < 2:
        raise ValueError(f"jacobi_svd: a must have shape (..., m, n), got {tuple(a.shape)}")
    if min(a.shape[-2:]) > SMALL:
        raise ValueError(
            f"jacobi_svd: min(m, n) must be at most {SMALL}, got {tuple(a.shape)}; larger matrices are for "
            "torch.linalg.svd"
        )


def _fake(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(a)
    batch, (m, n), dtype = a.shape[:-2], a.shape[-2:], compute_dtype(a)
    k = min(m, n)
    return (
        a.new_empty((*batch, m, k), dtype=dtype),
        a.new_empty((*batch, k), dtype=dtype),
        a.new_empty((*batch, n, k), dtype=dtype),
        a.new_empty(batch, dtype=torch.int32),
    )


_op = register("jacobi_svd", "(Tensor a) -> (Tensor u, Tensor s, Tensor v, Tensor sweeps)", fake=_fake)


def nonfinite_as_zero(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a in the arithmetic's dtype, matrices that hold NaN or Inf zeroed, and which those are.

    LAPACK refuses a whole batch for one of them.
    """
    a = a.to(compute_dtype(a))
    nonfinite = ~a.isfinite().all(-1).all(-1)
    return a.masked_fill(nonfinite[..., None, None], 0), nonfinite


@implements("jacobi_svd", "torch")
def _jacobi_svd_torch(
    a: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a, nonfinite = nonfinite_as_zero(a)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    nan = nonfinite[..., None].expand(s.shape)
    return (
        u.masked_fill(nan[..., None, :], torch.nan).contiguous(),
        s.masked_fill(nan, torch.nan).contiguous(),
        vh.mT.masked_fill(nan[..., None, :], torch.nan).contiguous(),
        -nonfinite.to(torch.int32),
    )


implements("jacobi_svd", "native", devices=("cuda",))(cuda.jacobi_svd)


def jacobi_svd(a: torch.Tensor) -> JacobiSVD:
    """Computes the thin SVD a = u diag(s) vᵀ, s descending, of matrices with min(m, n) ≤ 128.

    A kernel of its own: one-sided Jacobi, one block per matrix in shared memory, a warp per pair of columns.

    Args:
        a: (..., m, n), any floating dtype.

    Returns:
        u: (..., m, k) and v: (..., n, k), k = min(m, n), with orthonormal columns even where singular values
        are zero; s: (..., k), descending; all contiguous, float32 (float64 if a is).
        sweeps: (...) int32, the Jacobi sweeps made: 0 by LAPACK, negative where they did
        not suffice (the result is then what they reached) or where the matrix holds NaN or Inf (the result is
        then NaN).

    Raises:
        TypeError: a is not a floating tensor.
        ValueError: a is no matrix or batch of matrices, or min(m, n) > 128.

    Accuracy:
        ‖a − u diag(s) vᵀ‖ and the orthogonality of u and v to rounding. By Jacobi every singular value also
        has a small relative error where a (m ≥ n) is well conditioned up to a scaling of its columns, or
        (m < n) of its rows; values below 2^−90 ‖a‖ (float32; 2^−850 in float64) become zero.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        Hestenes, J. SIAM 6 (1958); Brent, Luk, SIAM J. Sci. Stat. Comput. 6 (1985); Demmel, Veselić, SIAM J.
        Matrix Anal. Appl. 13 (1992).
    """
    _check(a)
    return JacobiSVD(*_op(a))
