"""What the kernels share: rounding and operands that are right in the interpreter too, and their launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in the interpreter, whose bfloat16 arithmetic is wrong and has to be avoided."""

DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounds float32 x to dtype, to the nearest, ties to even; the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        # A NaN stays one: its carry could otherwise run over into the sign.
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def operand(x, INTERPRETED: tl.constexpr):
    """Prepares a factor of tl.dot: as it is when compiled, in float32 in the interpreter."""
    result = x.to(tl.float32) if INTERPRETED else x
    return result


@triton.jit
def divided(x, y):
    """X / y, correctly rounded."""
    result = x / y if x.dtype == tl.float64 else tl.div_rn(x, y)
    return result


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Launches a one-dimensional grid of a kernel on the device of its first argument.

    Args:
        kernel: the kernel.
        programs: of the grid; without any, as for results without entries, nothing is launched.
        arguments: of the kernel, the first a tensor.
        options: constants of the kernel, and num_warps and num_stages.
    """
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **options)


def float32_products() -> str:
    """How tl.dot multiplies float32 to float32 accuracy: three TF32 products, or as it is on AMD's units."""
    if INTERPRETED or triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"
    return "tf32x3"


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether Triton may assume 16 for addresses and strides, so that it loads whole vectors."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride == 1 or stride % 16 == 0 for stride in tensor.stride())
        for tensor in tensors
    )
