"""lowrank_add: GEMM by panels with a fused addition and rounding, against addmm on a float32 copy."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import competitors
from benchmarks.shapes import ADAPTER_RANKS, Layer
from dirmerge import ops

OP, CUPY = "lowrank_add", True


@pytest.mark.parametrize("rank", ADAPTER_RANKS)
def test_lowrank_add(
    measure: Callable[..., None], layer: Layer, rank: int, dtype: torch.dtype, backend: str
) -> None:
    m, n = layer.m, layer.n
    base = torch.randn(m, n).to(dtype)
    left, right = torch.randn(m, rank) / rank**0.5, torch.randn(n, rank)

    def check(result: torch.Tensor) -> None:
        rows = slice(None, None, max(1, m // 64))
        truth = base[rows].double() + 0.3 * left[rows].double() @ right.double().T
        assert ((result[rows].double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-5).all()

    measure(
        f"{layer}, rank {rank}",
        backend,
        dtype,
        lambda: ops.lowrank_add(base, left, right, scale=0.3),
        check,
        2 * base.nbytes + left.nbytes + right.nbytes,
        2 * m * n * rank,
        cupy=(competitors.lowrank_add, [base, left, right, 0.3]),
    )
