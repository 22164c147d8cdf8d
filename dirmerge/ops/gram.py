"""gram: the Gram matrix of the columns of every matrix of a batch."""

from __future__ import annotations

import torch

from dirmerge.backends import cuda, implements
from dirmerge.ops._registration import check_floating, compute_dtype, register


def _check(x: torch.Tensor) -> None:
    check_floating("gram", x=x)
    if x.dim() < 2:
        raise ValueError(f"gram: x must have shape (..., m, n), got {tuple(x.shape)}")


def _fake(x: torch.Tensor) -> torch.Tensor:
    _check(x)
    return x.new_empty((*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=compute_dtype(x))


_op = register("gram", "(Tensor x) -> Tensor", fake=_fake)


# Columns from which blocks on and above the diagonal beat one product on a CPU: 1.5 times at 4096.
_BLOCKED_FROM = 1024


def add_gram_(gram: torch.Tensor, x: torch.Tensor) -> None:
    """Adds xᵀx to gram; from 1024 columns on to the blocks on and above its diagonal alone.

    Args:
        gram: (..., n, n), changed in place; `mirror_` fills what is left out.
        x: (..., m, n) of the same dtype.
    """
    n = x.shape[-1]
    step = n if n < _BLOCKED_FROM else -(-n // 8)
    for start in range(0, n, max(step, 1)):
        left = x[..., start : start + step].mT
        gram[..., start : start + step, start:] += left @ x[..., start:]


def mirror_(gram: torch.Tensor) -> None:
    """Copies the blocks above the diagonal of what `add_gram_` made to below it."""
    n = gram.shape[-1]
    if n < _BLOCKED_FROM:
        return
    step = -(-n // 8)
    for start in range(0, n, step):
        stop = start + step
        gram[..., stop:, start:stop] = gram[..., start:stop, stop:].mT


@implements("gram", "torch")
def _gram_torch(x: torch.Tensor) -> torch.Tensor:
    x = x.to(compute_dtype(x))
    n = x.shape[-1]
    if n < _BLOCKED_FROM or not x.is_cpu:
        return x.mT @ x
    result = x.new_zeros((*x.shape[:-2], n, n))
    add_gram_(result, x)
    mirror_(result)
    return result


_NARROW = (torch.bfloat16, torch.float16, torch.float32)
implements("gram", "native", devices=("cuda",), dtypes=_NARROW)(cuda.gram)


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
