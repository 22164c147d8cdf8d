"""gram: the Gram matrix of the columns of every matrix of a batch."""

from __future__ import annotations

import torch

from dirmerge.backends import implements
from dirmerge.ops._registration import check_floating, compute_dtype, register


def _check(x: torch.Tensor) -> None:
    check_floating("gram", x=x)
    if x.dim() < 2:
        raise ValueError(f"gram: x must have shape (..., m, n), got {tuple(x.shape)}")


def _fake(x: torch.Tensor) -> torch.Tensor:
    _check(x)
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=compute_dtype(x))


_op = register("gram", "(Tensor x) -> Tensor", fake=_fake)


@implements("gram", "torch")
def _gram_torch(x: torch.Tensor) -> torch.Tensor:
    x = x.to(compute_dtype(x))
    return x.mT @ x


def gram(x: torch.Tensor) -> torch.Tensor:
    """Computes the Gram matrix xᵀx.

    A kernel of its own forms only the tiles on and above the diagonal, and stores each twice.

    Args:
        x: (..., m, n), any floating dtype.

    Returns:
        (..., n, n), contiguous, float32 (float64 if x is).

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x is not a matrix or a batch of matrices.

    Accuracy:
        Products and sums in float32 (float64 for float64); on tensor cores float32 is multiplied as three
        TF32 products, which keeps its accuracy.

    Differentiable:
        No: backward raises NotImplementedError.
    """
    _check(x)
    result: torch.Tensor = _op(x)
    return result
