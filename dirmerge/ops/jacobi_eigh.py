"""jacobi_eigh: the eigendecomposition of every small symmetric matrix of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dirmerge import cuda
from dirmerge.backends import implements
from dirmerge.ops._registration import check_floating, compute_dtype, register
from dirmerge.ops.jacobi_svd import SMALL, nonfinite_as_zero


class JacobiEigh(NamedTuple):
    """The decomposition of symmetric matrices, descending, and the Jacobi sweeps that each took."""

    values: torch.Tensor
    vectors: torch.Tensor
    sweeps: torch.Tensor


def _check(a: torch.Tensor) -> None:
    check_floating("jacobi_eigh", a=a)
    if a.dim() < 2 or a.shape[-2] != a.shape[-1]:
        raise ValueError(f"jacobi_eigh: a must have shape (..., n, n), got {tuple(a.shape)}")
    if a.shape[-1] > SMALL:
        raise ValueError(
            f"jacobi_eigh: n must be at most {SMALL}, got {a.shape[-1]}; larger matrices are for "
            "torch.linalg.eigh"
        )


def _fake(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(a)
    dtype = compute_dtype(a)
    return (
        a.new_empty(a.shape[:-1], dtype=dtype),
        a.new_empty(a.shape, dtype=dtype),
        a.new_empty(a.shape[:-2], dtype=torch.int32),
    )


_op = register("jacobi_eigh", "(Tensor a) -> (Tensor values, Tensor vectors, Tensor sweeps)", fake=_fake)


@implements("jacobi_eigh", "torch")
def _jacobi_eigh_torch(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lower, nonfinite = nonfinite_as_zero(a.tril())
    values, vectors = torch.linalg.eigh(lower)
    nan = nonfinite[..., None].expand(values.shape)
    return (
        values.flip(-1).masked_fill(nan, torch.nan).contiguous(),
        vectors.flip(-1).masked_fill(nan[..., None, :], torch.nan).contiguous(),
        -nonfinite.to(torch.int32),
    )


implements("jacobi_eigh", "native", devices=("cuda",))(cuda.jacobi_eigh)


def jacobi_eigh(a: torch.Tensor) -> JacobiEigh:
    """Computes a = w diag(λ) wᵀ, λ descending, of symmetric matrices with n ≤ 128.

    A kernel of its own: two-sided Jacobi, one block per matrix in shared memory, n / 2 rotations at a time.

    Args:
        a: (..., n, n) symmetric, any floating dtype; only the lower triangle is read.

    Returns:
        values λ: (..., n), descending; vectors w: (..., n, n) with orthonormal columns; both contiguous,
        float32 (float64 if a is).
        sweeps: (...) int32, the Jacobi sweeps made: 0 by LAPACK, negative where they did
        not suffice (the result is then what they reached) or where the matrix holds NaN or Inf (the result is
        then NaN).

    Raises:
        TypeError: a is not a floating tensor.
        ValueError: a is no square matrix or batch of them, or n > 128.

    Accuracy:
        ‖a − w diag(λ) wᵀ‖ and the orthogonality of w to rounding. By Jacobi the eigenvalues of a positive
        definite matrix also have a small relative error where a scaling d a d makes it well conditioned.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        Golub, Van Loan, Matrix Computations (2013), section 8.5; Demmel, Veselić, SIAM J. Matrix Anal. Appl.
        13 (1992).
    """
    _check(a)
    return JacobiEigh(*_op(a))
