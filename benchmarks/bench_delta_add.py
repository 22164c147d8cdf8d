"""delta_add: base plus a combination of three differences in one pass, against torch's pass per operation."""

from collections.abc import Callable

import torch

from benchmarks.shapes import Layer
from dirmerge import ops
from dirmerge.ops import DeltaAdd

OP, CUPY = "delta_add", False


def test_delta_add(measure: Callable[..., None], layer: Layer, dtype: torch.dtype, backend: str) -> None:
    shape = layer.m, layer.n
    base = torch.randn(shape).to(dtype)
    weights = [(base.float() + 0.01 * torch.randn(shape)).to(dtype) for _ in range(3)]
    coefficients = [0.5, 0.3, 0.2]

    def check(result: DeltaAdd) -> None:
        truth = base.double()
        for weight, coefficient in zip(weights, coefficients, strict=True):
            truth = truth + coefficient * (weight.double() - base.double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.value.double(), truth, rtol=eps, atol=1e-6)
        assert result.nonfinite == 0

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.delta_add(base, weights, coefficients),
        check,
        base.numel() * 5 * dtype.itemsize,
    )
