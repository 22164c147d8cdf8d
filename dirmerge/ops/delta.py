"""delta: the task matrix of a fine-tuned weight, with the two numbers that every caller wants of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dirmerge.backends import implements, native
from dirmerge.ops._registration import check_floating, compute_dtype, register, view


class Delta(NamedTuple):
    """A difference of two weights: its value, ‖value‖²_F, and how many of its entries are NaN or infinite."""

    value: torch.Tensor
    sum_of_squares: torch.Tensor
    nonfinite: torch.Tensor


def _check(finetuned: torch.Tensor, base: torch.Tensor) -> None:
    check_floating("delta", finetuned=finetuned, base=base)
    if finetuned.shape != base.shape:
        raise ValueError(
            f"delta: finetuned and base must have the same shape, got {tuple(finetuned.shape)} and "
            f"{tuple(base.shape)}"
        )


def _fake(finetuned: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(finetuned, base)
    return (
        finetuned.new_empty(finetuned.shape, dtype=compute_dtype(finetuned, base)),
        finetuned.new_empty((), dtype=torch.float64),
        finetuned.new_empty((), dtype=torch.int64),
    )


_op = register(
    "delta",
    "(Tensor finetuned, Tensor base) -> (Tensor value, Tensor sum_of_squares, Tensor nonfinite)",
    fake=_fake,
)

# Entries squared in float64 at a time: few enough for a CPU's cache, elsewhere enough to fill the device.
_PIECE_CPU, _PIECE = 1 << 16, 1 << 26


@implements("delta", "torch")
def _delta_torch(
    finetuned: torch.Tensor, base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(finetuned, base)
    value = (finetuned.to(dtype) - base.to(dtype)).contiguous()
    total = value.new_zeros((), dtype=torch.float64)
    nonfinite = value.new_zeros((), dtype=torch.int64)
    for piece in torch.split(value.view(-1), _PIECE_CPU if value.is_cpu else _PIECE):
        total += piece.double().square().sum()
        nonfinite += piece.numel() - piece.isfinite().count_nonzero()
    return value, total, nonfinite


@implements("delta", "native", devices=("cpu",))
def _delta_native(
    finetuned: torch.Tensor, base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    value = finetuned.new_empty(finetuned.shape, dtype=compute_dtype(finetuned, base))
    finetuned, base = finetuned.contiguous(), base.contiguous()
    total, nonfinite = native().delta(view(finetuned), view(base), view(value), torch.get_num_threads())
    return value, value.new_tensor(total, dtype=torch.float64), value.new_tensor(nonfinite, dtype=torch.int64)


def delta(finetuned: torch.Tensor, base: torch.Tensor) -> Delta:
    """Computes D = finetuned − base, ‖D‖²_F and the number of non-finite entries of D.

    One pass over both inputs: they are widened, subtracted, squared and tested as they are read.

    Args:
        finetuned: any shape, bfloat16, float16, float32 or float64.
        base: the same shape; its dtype may differ.

    Returns:
        value: contiguous, float32 (float64 if either input is); sum_of_squares: float64, 0-dim, not finite if
        an entry is not; nonfinite: int64, 0-dim.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: shapes or devices differ.

    Accuracy:
        The difference is rounded once. The squares are summed in float64; natively in an order that does not
        depend on the number of threads.

    Differentiable:
        No: backward raises NotImplementedError.
    """
    _check(finetuned, base)
    return Delta(*_op(finetuned, base))
