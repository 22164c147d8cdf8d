"""What the launchers of CUDA C++ and of Triton kernels share: inputs and results as the kernels take them.

The public function of an op has validated its arguments before a launcher runs. Nothing here waits for the
device. Every tensor made on the host names its device, so that a launcher also works where the caller has
set another default device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns the dtype an op computes in: float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copies a short list to the device without waiting for it."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Makes the table of the addresses of several tensors of one device, int64, on that device."""
    return on_device([tensor.data_ptr() for tensor in tensors], torch.int64, tensors[0].device)


def flattened(x: torch.Tensor) -> torch.Tensor:
    """Flattens (..., m, n) to (batch, m, n); copies only where no one stride describes the batch."""
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def by_task(x: torch.Tensor) -> torch.Tensor:
    """Returns x of shape (T, ...) with each x[t] contiguous; copies only where they are not."""
    return x if x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()


def gram_operands(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepares xᵀx of a 16-bit or float32 x: x as (batch, m, n), and its float32 result (..., n, n)."""
    n = x.shape[-1]
    return flattened(x), x.new_empty((*x.shape[:-2], n, n), dtype=torch.float32)


def elect_operands(
    x: torch.Tensor, thresholds: torch.Tensor | None, weights: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Prepares elect_merge.

    Args:
        x: (T, ...).
        thresholds: (T,), any floating dtype, or None.
        weights: T numbers, or None.

    Returns:
        x with each x[t] contiguous; thresholds and weights, contiguous, on its device in its compute dtype;
        the result, x.shape[1:] of the dtype of x.
    """
    compute = compute_dtype(x)
    return (
        by_task(x),
        None if thresholds is None else thresholds.to(compute).contiguous(),
        None if weights is None else on_device(weights, compute, x.device),
        x.new_empty(x.shape[1:]),
    )
