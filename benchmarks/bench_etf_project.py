"""etf_project: the core's rows centred and scaled; a CPU has torch's form alone (see the op's docstring)."""

from collections.abc import Callable

import torch

from benchmarks import competitors
from benchmarks.shapes import Core
from dirmerge import ops

OP, CUPY = "etf_project", True


def test_etf_project(measure: Callable[..., None], core: Core, dtype: torch.dtype, backend: str) -> None:
    K = core.K
    Z = torch.randn(K, K).to(dtype)

    def check(result: torch.Tensor) -> None:
        truth = (Z.double() - Z.double().mean(0)) * K / (K - 1)
        assert (result.double() - truth).norm() <= max(1e-6, torch.finfo(dtype).eps) * truth.norm()

    arrays = competitors.etf_project, [Z]
    measure(core, backend, dtype, lambda: ops.etf_project(Z), check, 2 * Z.nbytes, cupy=arrays)
