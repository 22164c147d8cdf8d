"""cover_space: polar([U_1 … U_T]) of eight adapters and of eight full fine-tunes, against torch's SVD."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import competitors, inputs
from benchmarks.shapes import ADAPTER_RANK, TASKS, Layer
from dirmerge.methods.spectral import cover_space
from dirmerge.methods.tasks import MergeRecord

VARIANTS = ("torch.linalg.svd", "exact", "auto")


@pytest.mark.parametrize("kind", ["adapters", "full"])
def test_cover_space(
    measure: Callable[..., None], affordable: Callable[[float], None], layer: Layer, kind: str, variant: str
) -> None:
    m = layer.m
    rank = ADAPTER_RANK if kind == "adapters" else min(layer.m, layer.n) // TASKS
    K = TASKS * rank
    by_svd = variant == "torch.linalg.svd"
    # Of a few adapters the frame stays a product, so nothing is applied to the bases.
    flops = inputs.svd_flops(m, K) + 2 * m * K * K if by_svd else inputs.gram_flops(m, K, 0)
    affordable(flops)
    bases = [inputs.orthonormal(m, rank) for _ in range(TASKS)]
    stacked = torch.cat(bases, 1)

    def check(result: Any) -> None:
        frame = result if isinstance(result, torch.Tensor) else result.frame()
        assert float((frame.mT @ frame).sub(torch.eye(K)).norm()) <= 1e-3
        # Of all orthonormal frames the polar factor is nearest: its product with the bases is symmetric.
        product = frame.mT @ stacked
        assert float((product - product.mT).norm()) <= 1e-3 * float(product.norm())

    def call() -> object:
        if by_svd:
            return competitors.cover(bases)
        return cover_space(
            stacked, "exact" if variant == "exact" else "auto", "left", MergeRecord("", {}, ())
        )

    case = f"{layer.family} {layer.name}, {kind}, {m}×{K}"
    measure(case, variant, stacked.dtype, call, check, 2 * stacked.nbytes, flops)
