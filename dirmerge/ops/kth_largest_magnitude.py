"""kth_largest_magnitude: the threshold that keeps the k largest entries of each task's matrix."""

from __future__ import annotations

import torch

from dirmerge.backends import cuda, implements, native
from dirmerge.backends.launch import by_task
from dirmerge.ops._registration import check_floating, compute_dtype, register, view


def _check(x: torch.Tensor, k: int) -> None:
    check_floating("kth_largest_magnitude", x=x)
    if x.dim() < 2:
        raise ValueError(f"kth_largest_magnitude: x must have shape (T, ...), got {tuple(x.shape)}")
    size = x[0].numel() if x.shape[0] else 0
    if x.shape[0] and not 1 <= k <= size:
        raise ValueError(f"kth_largest_magnitude: k must be from 1 to {size}, the size of x[t], got {k}")


def _fake(x: torch.Tensor, k: int) -> torch.Tensor:
    _check(x, k)
    return x.new_empty(x.shape[0])


_op = register("kth_largest_magnitude", "(Tensor x, SymInt k) -> Tensor", fake=_fake)


@implements("kth_largest_magnitude", "torch")
def _kth_largest_magnitude_torch(x: torch.Tensor, k: int) -> torch.Tensor:
    magnitudes = x.abs().flatten(1)
    return torch.kthvalue(magnitudes, magnitudes.shape[1] - k + 1, dim=1).values


@implements("kth_largest_magnitude", "native", devices=("cpu",))
def _kth_largest_magnitude_native(x: torch.Tensor, k: int) -> torch.Tensor:
    # Widening keeps order and value, so that 16-bit entries need no kernel of their own.
    value = by_task(x.to(compute_dtype(x)))
    result = value.new_empty(x.shape[0])
    native().kth_largest_magnitude(view(value), k, view(result), torch.get_num_threads())
    return result.to(x.dtype)


implements("kth_largest_magnitude", "native", devices=("cuda",))(cuda.kth_largest_magnitude)


def kth_largest_magnitude(x: torch.Tensor, k: int) -> torch.Tensor:
    """Finds the k-th largest |x[t]| of every t, exactly: sort(|x[t]|, descending)[k − 1].

    Selection by the bits of the numbers, which order magnitudes as integers do: no sort, no full copy.

    Args:
        x: (T, ...), any floating dtype.
        k: from 1 to the number of entries of x[t]. Ties count one by one.

    Returns:
        (T,), the dtype of x. NaN ranks above infinity, as in torch.topk.

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x has no first dimension, or k is out of range.

    Accuracy:
        Exact.

    Differentiable:
        No: backward raises NotImplementedError.
    """
    _check(x, k)
    result: torch.Tensor = _op(x, k)
    return result
