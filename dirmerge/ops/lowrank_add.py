"""lowrank_add: a low-rank update added to a weight and rounded to the dtype it is stored in."""

from __future__ import annotations

import torch

from dirmerge.backends import FLOATING, implements, native
from dirmerge.ops._registration import check_floating, compute_dtype, register, view


def _check(
    base: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype | None
) -> None:
    check_floating("lowrank_add", base=base, left=left, right=right)
    if base.dim() != 2 or left.dim() != 2 or right.dim() != 2:
        raise ValueError(
            "lowrank_add: base, left and right must be matrices, got shapes "
            f"{tuple(base.shape)}, {tuple(left.shape)} and {tuple(right.shape)}"
        )
    m, n = base.shape
    if left.shape[0] != m or right.shape[0] != n or left.shape[1] != right.shape[1]:
        raise ValueError(
            f"lowrank_add: left must have shape ({m}, k) and right ({n}, k) for base ({m}, {n}), got "
            f"{tuple(left.shape)} and {tuple(right.shape)}"
        )
    if out_dtype is not None and out_dtype not in FLOATING:
        raise TypeError(
            f"lowrank_add: out_dtype must be bfloat16, float16, float32 or float64, got {out_dtype}"
        )


def _fake(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check(base, left, right, out_dtype)
    return base.new_empty(base.shape, dtype=out_dtype or base.dtype)


_op = register(
    "lowrank_add",
    "(Tensor base, Tensor left, Tensor right, *, float scale=1.0, ScalarType? out_dtype=None) -> Tensor",
    fake=_fake,
)


@implements("lowrank_add", "torch")
def _lowrank_add_torch(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    dtype = compute_dtype(base)
    updated = torch.addmm(base.to(dtype), left.to(dtype), right.to(dtype).mT, alpha=scale)
    return updated.to(out_dtype or base.dtype)


# Entries of the product formed at a time: 8 MB stay in the last-level cache until they are added, and a panel
# has rows enough that the GEMM does not notice. No float32 copy of the whole matrix exists.
_PANEL = 1 << 21


@implements("lowrank_add", "native", devices=("cpu",), dtypes=(torch.bfloat16, torch.float16))
def _lowrank_add_native(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    m, n = base.shape
    if base.stride(1) != 1:
        base = base.contiguous()
    left = left.float()
    right_transposed = right.float().mT
    result = base.new_empty(base.shape, dtype=out_dtype or base.dtype)
    rows = max(1, min(m, _PANEL // max(n, 1)))
    panel = base.new_empty((rows, n), dtype=torch.float32)
    library, threads = native(), torch.get_num_threads()
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        update = panel[: part.stop - start]
        torch.mm(left[part], right_transposed, out=update)
        library.lowrank_add(view(base[part]), view(update), scale, view(result[part]), threads)
    return result


def lowrank_add(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes W = base + scale · left rightᵀ, rounded once to the dtype of the result.

    One GEMM; for a bfloat16 or float16 base by panels of rows, each added and rounded while it is in cache.

    Args:
        base: (m, n), any floating dtype.
        left: (m, k), any floating dtype.
        right: (n, k), any floating dtype.
        scale: factor λ of the update.
        out_dtype: dtype of the result; that of base by default.

    Returns:
        (m, n), contiguous, of out_dtype.

    Raises:
        TypeError: an input is not a floating tensor, or out_dtype is not a floating dtype.
        ValueError: shapes or devices do not fit.

    Accuracy:
        Float32 arithmetic (float64 if base is), then one rounding to the nearest, ties to even.

    Differentiable:
        No: backward raises NotImplementedError.
    """
    _check(base, left, right, out_dtype)
    result: torch.Tensor = _op(base, left, right, scale=scale, out_dtype=out_dtype)
    return result
