"""procrustes: the rotation of feature spaces, one SVD of d × d in float64, against torch's in float32."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import CORES, Core
from dirmerge.linalg import procrustes

VARIANTS = ("torch.linalg.svd", "procrustes")
POINTS = 1000


@pytest.mark.parametrize("features", CORES[1:4], ids=str)
def test_procrustes(measure: Callable[..., None], features: Core, variant: str) -> None:
    d = features.K
    rotation = torch.linalg.qr(torch.randn(d, d)).Q
    # det underflows in float32: its pivots' partial products do.
    rotation[:, 0] *= torch.linalg.slogdet(rotation).sign
    a = torch.randn(POINTS + d, d)
    b = a @ rotation

    def by_torch() -> torch.Tensor:
        u, _, vh = torch.linalg.svd(a.T @ b)
        return u @ vh

    def check(result: torch.Tensor) -> None:
        assert float((result - rotation).norm()) <= 1e-3

    call = by_torch if variant == "torch.linalg.svd" else lambda: procrustes(a, b)
    flops = 2 * len(a) * d * d + 26 * d**3
    measure(f"{len(a)} points, {features}", variant, a.dtype, call, check, 2 * a.nbytes + 4 * d * d, flops)
