"""rotation_step: eight rotations of the feature space of an encoder."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import CORES, TASKS, Core
from dirmerge import ops

OP, DTYPES = "rotation_step", (torch.float32,)


@pytest.mark.parametrize("features", CORES[1:4], ids=str)
def test_rotation_step(
    measure: Callable[..., None], features: Core, dtype: torch.dtype, backend: str
) -> None:
    d, steps = features.K, 8
    rotation = torch.linalg.qr(torch.randn(TASKS, d, d, dtype=dtype)).Q
    gradient = torch.randn(TASKS, d, d, dtype=dtype) / d**0.5

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        gram = result[0].double().mT @ result[0].double()
        assert (gram - torch.eye(d, dtype=torch.float64)).norm() <= 1e-4 * d**0.5

    measure(
        f"{TASKS} × {features}",
        backend,
        dtype,
        lambda: ops.rotation_step(rotation, gradient, rate=0.1, steps=steps),
        check,
        3 * rotation.nbytes,
        # Two products, then per step two symmetric ones and one more, and the deviation's Gram matrix.
        TASKS * (2 * 2 + steps * (1 + 1 + 2) + 1) * d**3,
    )
