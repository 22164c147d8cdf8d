"""delta: difference, sum of squares and non-finite count, against torch's three passes."""

from collections.abc import Callable

import torch

from benchmarks import competitors
from benchmarks.shapes import Layer
from dirmerge import ops
from dirmerge.ops import Delta

OP, CUPY = "delta", True


def test_delta(measure: Callable[..., None], layer: Layer, dtype: torch.dtype, backend: str) -> None:
    shape = layer.m, layer.n
    base = torch.randn(shape).to(dtype)
    finetuned = (base.float() + 0.01 * torch.randn(shape)).to(dtype)

    def check(result: Delta) -> None:
        value, total, nonfinite = result
        truth = finetuned.double() - base.double()
        assert torch.equal(value, truth.float())
        torch.testing.assert_close(total, truth.square().sum(), rtol=1e-6, atol=0)
        assert nonfinite == 0

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.delta(finetuned, base),
        check,
        base.numel() * (2 * dtype.itemsize + 4),
        cupy=(competitors.delta, [finetuned, base]),
    )
