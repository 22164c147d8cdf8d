"""delta_kth_magnitude: thresholds of three differences, selected as they are formed, against kthvalue."""

from collections.abc import Callable

import torch

from benchmarks.shapes import Layer
from dirmerge import ops
from dirmerge.ops import DeltaKthMagnitude

OP, CUPY = "delta_kth_magnitude", False


def test_delta_kth_magnitude(
    measure: Callable[..., None], layer: Layer, dtype: torch.dtype, backend: str
) -> None:
    shape = layer.m, layer.n
    base = torch.randn(shape).to(dtype)
    weights = [(base.float() + 0.01 * torch.randn(shape)).to(dtype) for _ in range(3)]
    k = base.numel() // 5

    def check(result: DeltaKthMagnitude) -> None:
        for weight, threshold in zip(weights, result.thresholds, strict=True):
            magnitudes = (weight.float() - base.float()).abs()
            assert (magnitudes > threshold).sum() < k <= (magnitudes >= threshold).sum()
        assert result.nonfinite == 0

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.delta_kth_magnitude(base, weights, k),
        check,
        base.numel() * 4 * dtype.itemsize,
    )
