"""polar: the orthogonal factor of stacked task bases, by every method, against torch's and CuPy's SVD."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import competitors, inputs
from benchmarks.shapes import Layer
from dirmerge.linalg import polar

VARIANTS = ("torch.linalg.svd", "cupy", "auto", "exact", "newton_schulz")


def test_polar(
    measure: Callable[..., None], affordable: Callable[[float], None], layer: Layer, variant: Any
) -> None:
    m, k = max(layer.m, layer.n), min(layer.m, layer.n)
    if variant == "newton_schulz":
        # Eight steps, on the Gram matrix where that is the smaller one.
        flops = 8.0 * min(4 * m * k * k + k**3, 5 * k**3) + 3 * m * k * k
    elif variant in ("auto", "exact"):
        flops = inputs.gram_flops(m, k, k)
    else:
        flops = inputs.svd_flops(m, k) + 2 * m * k * k
    affordable(flops)
    # Singular values from 0.02 to 1, as of task bases that overlap.
    u, v = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(k, k)).Q
    x = (u * torch.logspace(0, -1.7, k)) @ v.T

    def check(result: Any) -> None:
        q = result if isinstance(result, torch.Tensor) else result.q
        assert float((q - u @ v.T).norm()) <= 1e-4 * k**0.5
        assert float((q.mT @ q).sub(torch.eye(k)).norm()) <= 2e-5 * k**0.5

    def call() -> object:
        return competitors.polar(torch, x) if variant == "torch.linalg.svd" else polar(x, variant)

    case = f"{layer.family} {layer.name} {m}×{k}"
    measure(case, variant, x.dtype, call, check, 2 * x.nbytes, flops, cupy=(competitors.polar, [x]))
