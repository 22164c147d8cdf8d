"""What the algorithms share: checks of their inputs, threads, seeds, orthonormal bases."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.arrays import of_any_kind
from dirmerge.linalg.conditions import holds, is_deferred

SINGLE_THREAD_UP_TO = 256
# Smallest sine of the angle between a column and those before it for which two passes of CholeskyQR give an
# orthonormal basis; the first pass works on a float64 Gram matrix.
CHOLESKY_INDEPENDENCE = 1e-4


@runtime_checkable
class MatrixLike(Protocol):
    """A matrix (..., m, n) that is only multiplied, never read as a whole; `dirmerge.Difference` is one.

    Every method that reads the matrix raises ValueError where an entry is NaN or infinite; where decisions
    are deferred (see `conditions`) it notes that none is.
    """

    @property
    def shape(self) -> torch.Size:
        """(..., m, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float32 or float64."""

    @property
    def device(self) -> torch.device:
        """The device of the products."""

    @property
    def mT(self) -> MatrixLike:  # noqa: N802  torch's name
        """The transpose."""

    def __matmul__(self, x: Tensor, /) -> Tensor:
        """Computes the product (..., m, s) with x (..., n, s)."""

    def dense(self) -> Tensor:
        """Returns the matrix as one tensor of `shape`."""

    def sketch(self, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """Computes the product (..., m, width) with random signs, and ‖·‖²_F (...) in float64."""

    def gram(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Computes the Gram matrix (..., n, n) of the columns in dtype, and ‖·‖²_F (...) in float64."""


def working(x: Tensor, name: str = "x") -> Tensor:
    """Returns x in the arithmetic's dtype: float32, or float64 as it is."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (..., m, n), got {tuple(x.shape)}")
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


@of_any_kind
def all_finite(x: Tensor) -> bool:
    """Returns whether x holds no NaN and no Inf: a sum, and a second pass only where that is not finite.

    Where decisions are deferred it is taken for granted, and the sum, in float32 at least, is the condition.
    """
    if is_deferred(x):
        return holds(torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))))
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def finite(x: Tensor, name: str = "x") -> Tensor:
    """Returns x, or raises ValueError where it holds NaN or Inf."""
    if not all_finite(x):
        raise ValueError(f"{name} must be finite, got NaN or Inf")
    return x


@contextmanager
def single_thread(size: int) -> Iterator[None]:
    """Runs what works on this many columns by one thread, where more would only wait for each other.

    Measured on two cores: eigh of 128 x 128 takes 1.0 ms with one thread and 10 ms with two;
    where other processes share the cores, every small operation waits for its slower thread.
    """
    threads = torch.get_num_threads()
    if size > SINGLE_THREAD_UP_TO or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seed_for(name: str, seed: int = 0) -> int:
    """Returns the fixed seed of a parameter: the first 63 bits of SHA-256(seed, name).

    A result that depends on nothing but its own name and the recipe's seed is the same for any order, worker
    or device count.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def kept_directions(s: Tensor, size: int, limit: int) -> int:
    """Returns how many of the leading `limit` singular values stand above rounding; usually all.

    Args:
        s: (k,) singular values, descending.
        size: max(m, n) of the matrix they belong to.
        limit: largest answer.
    """
    limit = min(limit, s.shape[-1])
    rank = numerical_rank(s, size)
    return limit if holds(rank >= limit) else int(rank)


@of_any_kind
def numerical_rank(s: Tensor, size: int) -> Tensor:
    """Returns how many of the descending singular values stand above rounding: s_i > ε √size · s_1.

    Args:
        s: (..., k) singular values, descending.
        size: max(m, n) of the matrix they belong to.

    Returns:
        (...,) int64.
    """
    if s.shape[-1] == 0:
        return torch.zeros(s.shape[:-1], dtype=torch.int64, device=s.device)
    cutoff = torch.finfo(s.dtype).eps * math.sqrt(size) * s[..., :1]
    return (s > cutoff).sum(-1)


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Computes eigenvalues, ascending, and eigenvectors of symmetric matrices."""
    with single_thread(gram.shape[-1]):
        values, vectors = torch.linalg.eigh(gram)
    return values, vectors


def orthonormal(y: Tensor) -> tuple[Tensor, Tensor]:
    """Computes an orthonormal basis q of the columns of y, and r with y = q r.

    CholeskyQR in mixed precision, then a second pass (GEMM and triangular solves only); Householder QR where
    the columns of y are nearly dependent.

    Args:
        y: (..., m, k) with m >= k, float32 or float64.

    Returns:
        q (..., m, k) and r (..., k, k), upper triangular.

    Source:
        Yamamoto et al., ETNA 44 (2015) (CholeskyQR2); Yamazaki, Tomov, Dongarra, SIAM J. Sci. Comput. 37
        (2015) (mixed precision).
    """
    first, info = torch.linalg.cholesky_ex(ops.gram(y.double()))
    norms = torch.linalg.vector_norm(first, dim=-1)
    sines = first.diagonal(dim1=-2, dim2=-1) / norms
    # A norm of 0 makes a NaN, which is not above the limit either.
    is_independent = (info == 0) & (sines > CHOLESKY_INDEPENDENCE).all(-1)
    if holds(is_independent):
        first = first.to(y.dtype)
        q = torch.linalg.solve_triangular(first.mT, y, upper=True, left=False)
        second, info = torch.linalg.cholesky_ex(ops.gram(q))
        if holds(info == 0):
            q = torch.linalg.solve_triangular(second.mT, q, upper=True, left=False)
            return q, second.mT @ first.mT
    q, r = torch.linalg.qr(y)
    return q, r
