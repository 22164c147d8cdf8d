"""etf_project: centring by torch; a native kernel gained too little to be kept (see the op's docstring)."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import CORES
from dirmerge import ops


@pytest.mark.parametrize("core", CORES)
def test_etf_project(measure: Callable[..., None], core: str) -> None:
    K = CORES[core]
    Z = torch.randn(K, K)

    def check(result: torch.Tensor) -> None:
        truth = (Z.double() - Z.double().mean(0)) * K / (K - 1)
        assert (result.double() - truth).norm() <= 1e-6 * truth.norm()

    measure(f"{K}×{K}", "torch", Z.dtype, lambda: ops.etf_project(Z), check, 2 * Z.nbytes)
