"""What the ops share: entry into torch's dispatcher, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from dirmerge import backends
from dirmerge.backends.launch import compute_dtype

__all__ = ["check_floating", "compute_dtype", "register", "view"]


def register(name: str, schema: str, *, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `dirmerge::<name>`, whose one kernel asks the backend table, and returns the callable overload.

    The first argument of the op decides: its device and dtype select the implementation. If it is an optional
    tensor and absent, the first tensor of the list that follows decides.

    Args:
        name: name of the op.
        schema: arguments and returns in torch.library's notation.
        fake: computes the outputs' shapes and dtypes, and validates as the public function does.
    """
    qualified = f"dirmerge::{name}"
    torch.library.define(qualified, schema)

    def kernel(first: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
        deciding: torch.Tensor = args[0][0] if first is None else first
        return backends.select(name, deciding.device, deciding.dtype)(first, *args, **kwargs)

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(f"dirmerge.ops.{name} is not differentiable: detach its inputs")

    # Not register_kernel: its wrapper imports torch._dynamo at the first call, which takes seconds.
    torch.library.impl(qualified, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(qualified, backward)
    overload: Callable[..., Any] = getattr(torch.ops.dirmerge, name).default
    return overload


def check_floating(op: str, **tensors: object) -> None:
    """Raises TypeError unless all are tensors of a supported floating dtype, ValueError if devices differ."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in backends.FLOATING:
            raise TypeError(
                f"{op}: {name} must have dtype bfloat16, float16, float32 or float64, got "
                f"{str(tensor.dtype).removeprefix('torch.')}; dequantise or convert it first"
            )
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like the others, got {tensor.device}")
        device = tensor.device


def view(tensor: torch.Tensor) -> Any:
    """Describes a CPU tensor, which must outlive the view, to the native library, which knows no torch."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return backends.native().View(tensor.data_ptr(), dtype, tensor.shape, tensor.stride())
