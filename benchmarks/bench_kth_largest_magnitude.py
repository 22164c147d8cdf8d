"""kth_largest_magnitude: selection by bits, against torch.kthvalue on the magnitudes."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import CORES, TASKS
from dirmerge import ops


@pytest.mark.parametrize("keep", [0.001, 0.2], ids=["DC-Merge", "TIES"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_kth_largest_magnitude(measure: Callable[..., None], core: str, keep: float, backend: str) -> None:
    K = CORES[core]
    k = max(1, int(keep * K * K))
    x = torch.randn(TASKS, K, K)

    def check(result: torch.Tensor) -> None:
        magnitudes = x.abs().flatten(1)
        assert ((magnitudes >= result[:, None]).sum(1) >= k).all()
        assert ((magnitudes > result[:, None]).sum(1) < k).all()

    measure(
        f"{TASKS} × {K}×{K}, k = {keep} K²",
        backend,
        x.dtype,
        lambda: ops.kth_largest_magnitude(x, k),
        check,
        x.nbytes,
    )
