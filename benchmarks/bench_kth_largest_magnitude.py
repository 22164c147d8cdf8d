"""kth_largest_magnitude: selection by bits, against torch.kthvalue on the magnitudes."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import competitors
from benchmarks.shapes import TASKS, Core
from dirmerge import ops

OP, CUPY = "kth_largest_magnitude", True


@pytest.mark.parametrize("keep", [0.001, 0.2], ids=["DC-Merge", "TIES"])
def test_kth_largest_magnitude(
    measure: Callable[..., None], core: Core, keep: float, dtype: torch.dtype, backend: str
) -> None:
    K = core.K
    k = max(1, int(keep * K * K))
    x = torch.randn(TASKS, K, K).to(dtype)

    def check(result: torch.Tensor) -> None:
        magnitudes = x.abs().flatten(1)
        assert ((magnitudes >= result[:, None]).sum(1) >= k).all()
        assert ((magnitudes > result[:, None]).sum(1) < k).all()

    measure(
        f"{TASKS} × {core}, k = {keep} K²",
        backend,
        dtype,
        lambda: ops.kth_largest_magnitude(x, k),
        check,
        x.nbytes,
        cupy=(competitors.kth_largest_magnitude, [x, k]),
    )
