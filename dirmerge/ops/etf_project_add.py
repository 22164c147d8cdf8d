"""etf_project_add: the simplex ETF's Gram operator on a dense update, added to a weight and rounded."""

from __future__ import annotations

import torch

from dirmerge import cuda
from dirmerge.backends import FLOATING, implements
from dirmerge.ops._registration import check_floating, compute_dtype, register


def _check(
    base: torch.Tensor, update: torch.Tensor, frame_sum: torch.Tensor, K: int, out_dtype: torch.dtype | None
) -> None:
    check_floating("etf_project_add", base=base, update=update, frame_sum=frame_sum)
    if base.dim() != 2 or update.shape != base.shape:
        raise ValueError(
            "etf_project_add: base and update must be matrices of one shape, got "
            f"{tuple(base.shape)} and {tuple(update.shape)}"
        )
    if frame_sum.shape != base.shape[:1]:
        raise ValueError(
            f"etf_project_add: frame_sum must have shape ({base.shape[0]},), one entry per row of base, got "
            f"{tuple(frame_sum.shape)}"
        )
    if K < 2:
        raise ValueError(f"etf_project_add: K must be at least 2, got {K}")
    if out_dtype is not None and out_dtype not in FLOATING:
        raise TypeError(
            f"etf_project_add: out_dtype must be bfloat16, float16, float32 or float64, got {out_dtype}"
        )


def _fake(
    base: torch.Tensor,
    update: torch.Tensor,
    frame_sum: torch.Tensor,
    K: int,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check(base, update, frame_sum, K, out_dtype)
    return base.new_empty(base.shape, dtype=out_dtype or base.dtype)


_op = register(
    "etf_project_add",
    "(Tensor base, Tensor update, Tensor frame_sum, int K, *, float scale=1.0, "
    "ScalarType? out_dtype=None) -> Tensor",
    fake=_fake,
)


@implements("etf_project_add", "torch")
def _etf_project_add_torch(
    base: torch.Tensor,
    update: torch.Tensor,
    frame_sum: torch.Tensor,
    K: int,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    dtype = compute_dtype(base)
    update, frame_sum = update.to(dtype), frame_sum.to(dtype)
    projected = torch.addr(update, frame_sum, frame_sum @ update, alpha=-1 / K)
    result = projected.mul_(scale * K / (K - 1)).add_(base)
    return result.to(out_dtype or base.dtype).contiguous()


implements("etf_project_add", "native", devices=("cuda",))(cuda.etf_project_add)


def etf_project_add(
    base: torch.Tensor,
    update: torch.Tensor,
    frame_sum: torch.Tensor,
    K: int,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes W = base + scale · K/(K − 1) · (D − q (qᵀD) / K), rounded once; D = update, q = frame_sum.

    This is base + scale · G D with the Gram operator G = M Mᵀ of the simplex ETF M = √(K/(K−1)) F (I − 11ᵀ/K)
    on an orthonormal frame F (m, K): I − 11ᵀ/K is a projector, so G = K/(K−1) · F (I − 11ᵀ/K) Fᵀ
    = K/(K−1) · (F Fᵀ − q qᵀ/K) with q = F 1, and F Fᵀ D = D for a D in the range of F. G (m, m) is never
    formed: one product with q, then a rank-one update fused with the addition. Of a D outside that range
    the part that F does not span is kept, where G would drop it.

    Args:
        base: (m, n) W_0, any floating dtype.
        update: (m, n) D, the shared update, its columns in the range of the frame; any floating dtype.
        frame_sum: (m,) q, the sum of the frame's K columns; any floating dtype.
        K: number of vertices, at least 2.
        scale: factor λ of the update.
        out_dtype: dtype of the result; that of base by default.

    Returns:
        (m, n), contiguous, of out_dtype.

    Raises:
        TypeError: an input is not a floating tensor, or out_dtype is not a floating dtype.
        ValueError: shapes or devices do not fit, or K is less than 2.

    Accuracy:
        Float32 arithmetic (float64 if base is), then one rounding to the nearest, ties to even.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        MDA (arXiv 2512.00391), projection onto the ETF basis by Gram operator multiplication.
    """
    _check(base, update, frame_sum, K, out_dtype)
    result: torch.Tensor = _op(base, update, frame_sum, K, scale=scale, out_dtype=out_dtype)
    return result
