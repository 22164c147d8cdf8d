"""etf_project_add: the ETF's Gram operator on a dense float32 update, added to a weight."""

from collections.abc import Callable

import torch

from benchmarks import competitors
from benchmarks.shapes import TASKS, Layer
from dirmerge import ops

OP, CUPY = "etf_project_add", True


def test_etf_project_add(
    measure: Callable[..., None], layer: Layer, dtype: torch.dtype, backend: str
) -> None:
    m, n = layer.m, layer.n
    K = min(m, n) // TASKS * TASKS
    base, update = torch.randn(m, n).to(dtype), torch.randn(m, n)
    frame_sum = torch.randn(m) * (K / m) ** 0.5

    def check(result: torch.Tensor) -> None:
        q, D = frame_sum.double(), update[:, :64].double()
        truth = base[:, :64].double() + 0.3 * K / (K - 1) * (D - torch.outer(q, q @ D) / K)
        error = (result[:, :64].double() - truth).norm()
        assert error <= max(1e-6, torch.finfo(dtype).eps) * truth.norm()

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.etf_project_add(base, update, frame_sum, K, scale=0.3),
        check,
        # The update is read twice: once for its product with q.
        2 * base.nbytes + 2 * update.nbytes,
        cupy=(competitors.etf_project_add, [base, update, frame_sum, K, 0.3]),
    )
