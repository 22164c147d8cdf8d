"""polar_step: one polynomial step of the iterations for the orthogonal polar factor."""

from __future__ import annotations

import torch

from dirmerge.backends import implements
from dirmerge.ops._registration import check_floating, compute_dtype, register


def _check(x: torch.Tensor) -> None:
    check_floating("polar_step", x=x)
    if x.dim() < 2:
        raise ValueError(f"polar_step: x must have shape (..., m, k), got {tuple(x.shape)}")


def _fake(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    _check(x)
    return x.new_empty(x.shape)


_op = register("polar_step", "(Tensor x, float a, float b, float c) -> Tensor", fake=_fake)


@implements("polar_step", "torch")
def _polar_step_torch(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    value = x.to(compute_dtype(x))
    tall = value.shape[-2] >= value.shape[-1]
    gram = value.mT @ value if tall else value @ value.mT
    polynomial = b * gram + c * (gram @ gram)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    value = value @ polynomial if tall else polynomial @ value
    return value.to(x.dtype)


def polar_step(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """Computes x (aI + bG + cG²) with G = xᵀx: every singular value s becomes a s + b s³ + c s⁵.

    The smaller of the two Gram matrices, its square fused into the polynomial, one product with x.

    Args:
        x: (..., m, k), any floating dtype; singular values of about 1 or less.
        a: coefficient of s.
        b: coefficient of s³.
        c: coefficient of s⁵; (15/8, −10/8, 3/8) is the quintic Newton–Schulz step.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x is not a matrix or a batch of matrices.

    Accuracy:
        Float32 arithmetic (float64 for float64), rounded once to the dtype of x. The Triton kernel multiplies
        bfloat16 x by the polynomial as a sum of two bfloat16 matrices, 16 bits of it.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        Higham, Functions of Matrices (2008), ch. 8; Amsel et al., The Polar Express, arXiv 2505.16932.
    """
    _check(x)
    result: torch.Tensor = _op(x, float(a), float(b), float(c))
    return result
