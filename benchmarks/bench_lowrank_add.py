"""lowrank_add: GEMM by panels with a fused addition and rounding, against addmm on a float32 copy."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import ADAPTER_RANKS, LAYERS
from dirmerge import ops


@pytest.mark.parametrize("rank", ADAPTER_RANKS)
@pytest.mark.parametrize("layer", ["MiniLM MLP", "LLaMA-7B attention", "LLaMA-7B MLP"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_lowrank_add(measure: Callable[..., None], layer: str, rank: int, backend: str) -> None:
    m, n = LAYERS[layer]
    base = torch.randn(m, n).bfloat16()
    left, right = torch.randn(m, rank) / rank**0.5, torch.randn(n, rank)

    def check(result: torch.Tensor) -> None:
        rows = slice(None, None, max(1, m // 64))
        truth = base[rows].double() + 0.3 * left[rows].double() @ right.double().T
        assert ((result[rows].double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all()

    measure(
        f"{layer} {m}×{n}, rank {rank}",
        backend,
        base.dtype,
        lambda: ops.lowrank_add(base, left, right, scale=0.3),
        check,
        2 * base.nbytes + left.nbytes + right.nbytes,
        2 * m * n * rank,
    )
