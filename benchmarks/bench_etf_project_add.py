"""etf_project_add: the ETF's Gram operator on a dense update, added to a weight."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import LAYERS, TASKS
from dirmerge import ops


@pytest.mark.parametrize("layer", ["MiniLM MLP", "LLaMA-7B attention"])
def test_etf_project_add(measure: Callable[..., None], layer: str) -> None:
    m, n = LAYERS[layer]
    K = min(m, n) // TASKS * TASKS
    base, update = torch.randn(m, n).bfloat16(), torch.randn(m, n)
    frame_sum = torch.randn(m) * (K / m) ** 0.5

    def check(result: torch.Tensor) -> None:
        q, D = frame_sum.double(), update[:, :64].double()
        truth = base[:, :64].double() + 0.3 * K / (K - 1) * (D - torch.outer(q, q @ D) / K)
        assert (result[:, :64].double() - truth).norm() <= 2**-8 * truth.norm()

    measure(
        f"{layer} {m}×{n}",
        "torch",
        base.dtype,
        lambda: ops.etf_project_add(base, update, frame_sum, K, scale=0.3),
        check,
        2 * base.nbytes + 2 * update.nbytes,
        6 * m * n,
    )
