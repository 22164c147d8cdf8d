"""svd_truncated: the leading p/8 triplets, exact and randomized, against the full SVD of torch and CuPy."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import competitors, inputs
from benchmarks.shapes import TASKS, Layer
from dirmerge.linalg import svd_truncated

VARIANTS = ("torch.linalg.svd", "cupy", "exact", "randomized")


def test_svd_truncated(
    measure: Callable[..., None], affordable: Callable[[float], None], layer: Layer, variant: Any
) -> None:
    m, n = layer.m, layer.n
    p = min(m, n)
    rank = p // TASKS
    if variant == "randomized":
        # A sketch, two power iterations and the last pass.
        flops = 12.0 * m * n * (rank + 16)
    else:
        flops = inputs.gram_flops(m, n, rank) if variant == "exact" else inputs.svd_flops(m, n)
    affordable(flops)
    a = inputs.delta(m, n)

    def check(result: Any) -> None:
        u, s, v = result if isinstance(result, tuple) else (result.u, result.s, result.v)
        # Of an approximation with orthonormal factors, the energy it captures says how good it is.
        captured = float((u.double().mT @ a.double() @ v.double()).square().sum() / a.double().square().sum())
        best = inputs.best_energy(p, rank)
        assert captured >= (0.98 if variant == "randomized" else 1 - 1e-5) * best
        assert float((u.mT @ u).sub(torch.eye(rank)).norm()) <= 1e-3
        truth = inputs.spectrum(p)[:rank]
        assert float((s.double() - truth).norm() / truth.norm()) <= (
            0.02 if variant == "randomized" else 1e-5
        )

    def call() -> object:
        if variant == "torch.linalg.svd":
            return competitors.svd(torch, a, rank)
        return svd_truncated(a, rank, variant)

    measure(
        f"{layer}, rank {rank}",
        variant,
        a.dtype,
        call,
        check,
        a.nbytes + 4 * (m + n + 1) * rank,
        flops,
        cupy=(competitors.svd, [a, rank]),
    )
