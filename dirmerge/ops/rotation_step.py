"""rotation_step: a Riemannian gradient step on SO(d), retracted by polar steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from dirmerge.backends import implements
from dirmerge.ops._registration import check_floating, register
from dirmerge.ops.polar_step import _polar_step_torch


class RotationStep(NamedTuple):
    """The rotations after a step, and how far each is from orthogonal: ‖RᵀR − I‖_F / √d."""

    rotation: torch.Tensor
    deviation: torch.Tensor


def _check(rotation: torch.Tensor, gradient: torch.Tensor, rate: float, steps: int) -> None:
    check_floating("rotation_step", rotation=rotation, gradient=gradient)
    if rotation.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "rotation_step: rotation must be float32 or float64, which alone can hold a rotation, got "
            f"{str(rotation.dtype).removeprefix('torch.')}"
        )
    if rotation.dim() < 2 or rotation.shape[-2] != rotation.shape[-1]:
        raise ValueError(f"rotation_step: rotation must have shape (..., d, d), got {tuple(rotation.shape)}")
    if gradient.shape != rotation.shape:
        raise ValueError(
            f"rotation_step: gradient must have the shape of rotation, {tuple(rotation.shape)}, got "
            f"{tuple(gradient.shape)}"
        )
    if not math.isfinite(rate):
        raise ValueError(f"rotation_step: rate must be finite, got {rate}")
    if steps < 1:
        raise ValueError(f"rotation_step: steps must be at least 1, got {steps}")


def _fake(
    rotation: torch.Tensor, gradient: torch.Tensor, *, rate: float, steps: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(rotation, gradient, rate, steps)
    return rotation.new_empty(rotation.shape), rotation.new_empty(rotation.shape[:-2])


_op = register(
    "rotation_step",
    "(Tensor rotation, Tensor gradient, *, float rate, int steps=8) -> (Tensor rotation, Tensor deviation)",
    fake=_fake,
)


@implements("rotation_step", "torch")
def _rotation_step_torch(
    rotation: torch.Tensor, gradient: torch.Tensor, *, rate: float, steps: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    d = rotation.shape[-1]
    product = rotation.mT @ gradient.to(rotation.dtype)
    skew = (product - product.mT) / 2
    # The singular values of a skew matrix come in pairs, so ‖S‖₂ ≤ ‖S‖_F / √2; those of I − ηS are
    # √(1 + η²σ²), and the polar steps want them at 1 or below.
    bound = torch.minimum(
        (torch.linalg.matrix_norm(product, 1) + torch.linalg.matrix_norm(product, math.inf)) / 2,
        torch.linalg.matrix_norm(product) / math.sqrt(2),
    )
    scale = (1 + (rate * bound).square()).rsqrt()
    factor = -rate * skew
    factor.diagonal(dim1=-2, dim2=-1).add_(1)
    stepped = rotation @ (scale[..., None, None] * factor)
    for _ in range(steps):
        stepped = _polar_step_torch(stepped, 15 / 8, -10 / 8, 3 / 8)
    deviation = stepped.mT @ stepped
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1)
    norm: torch.Tensor = torch.linalg.matrix_norm(deviation)
    return stepped, norm / math.sqrt(d)


def rotation_step(
    rotation: torch.Tensor, gradient: torch.Tensor, *, rate: float, steps: int = 8
) -> RotationStep:
    """Computes polar(R (I − η S)) with S = (RᵀΓ − ΓᵀR)/2, a gradient step on SO(d) with its retraction.

    R (I − η S), scaled to singular values of 1 or less by a bound of ‖S‖, then quintic Newton–Schulz steps.
    As det(I − η S) > 0 for skew S, a rotation stays one; errors of R itself are corrected along.

    Args:
        rotation: (..., d, d) rotations R, float32 or float64.
        gradient: (..., d, d) Euclidean gradients Γ, any floating dtype.
        rate: step size η.
        steps: Newton–Schulz steps, at least 1. Eight are enough while η ‖S‖ stays below about 15.

    Returns:
        rotation: (..., d, d), contiguous; deviation: (...), ‖RᵀR − I‖_F / √d of it, for the caller to compare
        with his tolerance: a step too large for `steps` shows there.

    Raises:
        TypeError: rotation is not float32 or float64, or gradient no floating tensor.
        ValueError: shapes do not fit, rate is not finite or steps < 1.

    Accuracy:
        Orthogonal to the rounding of the dtype once converged.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        MDA (arXiv 2512.00391), the rotation of the feature space; Absil, Mahony, Sepulchre, Optimization
        Algorithms on Matrix Manifolds (2008), section 4.1.
    """
    _check(rotation, gradient, rate, steps)
    return RotationStep(*_op(rotation, gradient, rate=float(rate), steps=steps))
