"""polar_step: one quintic Newton–Schulz step."""

from collections.abc import Callable

import torch

from benchmarks import competitors
from benchmarks.shapes import Layer
from dirmerge import ops

OP, CUPY = "polar_step", True
QUINTIC = 15 / 8, -10 / 8, 3 / 8


def test_polar_step(
    measure: Callable[..., None],
    affordable: Callable[[float], None],
    layer: Layer,
    dtype: torch.dtype,
    backend: str,
) -> None:
    m, k = layer.m, layer.n
    # Both symmetric products need their upper triangle only.
    flops = m * k * (k + 1) + k * k * (k + 1) + 2 * m * k * k
    affordable(flops)
    x = (torch.randn(m, k) / (2 * m**0.5)).to(dtype)
    a, b, c = QUINTIC

    def check(result: torch.Tensor) -> None:
        rows = x[:64].double()
        once = (rows @ x.double().T) @ x.double()
        twice = (once @ x.double().T) @ x.double()
        truth = a * rows + b * once + c * twice
        error = (result[:64].double() - truth).norm()
        assert error <= max(1e-5, torch.finfo(dtype).eps) * truth.norm()

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.polar_step(x, a, b, c),
        check,
        2 * x.nbytes,
        flops,
        gemm=dtype if backend == "triton" else None,
        cupy=(competitors.polar_step, [x, a, b, c]),
    )
