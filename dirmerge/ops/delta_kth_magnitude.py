"""delta_kth_magnitude: the threshold that keeps the k largest entries of each task matrix, never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dirmerge.backends import implements, native
from dirmerge.ops._registration import compute_dtype, register, view
from dirmerge.ops.delta_add import check_weights
from dirmerge.ops.kth_largest_magnitude import kth_largest_magnitude


class DeltaKthMagnitude(NamedTuple):
    """The thresholds of T task matrices, and how many of their entries are NaN or infinite."""

    thresholds: torch.Tensor
    nonfinite: torch.Tensor


def _check(base: torch.Tensor | None, weights: Sequence[torch.Tensor], k: int) -> None:
    check_weights("delta_kth_magnitude", base, weights)
    size = weights[0].numel()
    if not 1 <= k <= size:
        raise ValueError(f"delta_kth_magnitude: k must be from 1 to {size}, the size of a weight, got {k}")


def _tensors(base: torch.Tensor | None, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(weights) if base is None else [base, *weights]


def _fake(
    base: torch.Tensor | None, weights: Sequence[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(base, weights, k)
    thresholds = weights[0].new_empty(len(weights), dtype=compute_dtype(*_tensors(base, weights)))
    return thresholds, weights[0].new_empty((), dtype=torch.int64)


_op = register(
    "delta_kth_magnitude",
    "(Tensor? base, Tensor[] weights, SymInt k) -> (Tensor thresholds, Tensor nonfinite)",
    fake=_fake,
)


@implements("delta_kth_magnitude", "torch")
def _delta_kth_magnitude_torch(
    base: torch.Tensor | None, weights: Sequence[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(*_tensors(base, weights))
    origin = None if base is None else base.to(dtype)
    nonfinite = weights[0].new_zeros((), dtype=torch.int64)
    thresholds = []
    for weight in weights:
        difference = weight.to(dtype) if origin is None else weight.to(dtype) - origin
        nonfinite += difference.numel() - difference.isfinite().count_nonzero()
        thresholds.append(kth_largest_magnitude(difference.reshape(1, -1), k))
    return torch.cat(thresholds), nonfinite


@implements("delta_kth_magnitude", "native", devices=("cpu",))
def _delta_kth_magnitude_native(
    base: torch.Tensor | None, weights: Sequence[torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    thresholds = weights[0].new_empty(len(weights), dtype=compute_dtype(*_tensors(base, weights)))
    origin = None if base is None else base.contiguous()
    contiguous = [weight.contiguous() for weight in weights]
    nonfinite = native().delta_kth_magnitude(
        None if origin is None else view(origin),
        [view(weight) for weight in contiguous],
        k,
        view(thresholds),
        torch.get_num_threads(),
    )
    return thresholds, torch.tensor(nonfinite, dtype=torch.int64)


def delta_kth_magnitude(
    base: torch.Tensor | None, weights: Sequence[torch.Tensor], k: int
) -> DeltaKthMagnitude:
    """Finds the k-th largest |W_t − W_0| of every t, exactly: kth_largest_magnitude of the differences.

    Selection by the bits of the numbers in a few passes. Natively each pass forms the differences anew as the
    weights are read; in torch one difference is in memory at a time.

    Args:
        base: any shape, bfloat16, float16, float32 or float64: W_0. None: W_0 = 0, the weights are the
            differences.
        weights: T ≥ 1 tensors W_t of the same shape; dtypes may differ.
        k: from 1 to the number of entries of a weight. Ties count one by one.

    Returns:
        thresholds: (T,), float32 (float64 if any input is), NaN ranks above infinity; nonfinite: int64,
        0-dim, the number of NaN and infinite entries of all differences, summed over the tasks.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: shapes or devices do not fit, or k is out of range.

    Accuracy:
        Exact for the differences, which are rounded once.

    Differentiable:
        No: backward raises NotImplementedError.
    """
    weights = list(weights)
    _check(base, weights, k)
    return DeltaKthMagnitude(*_op(base, weights, k))
