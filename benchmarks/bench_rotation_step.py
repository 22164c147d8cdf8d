"""rotation_step: eight rotations of the feature space of a small encoder."""

from collections.abc import Callable

import torch

from benchmarks.shapes import TASKS
from dirmerge import ops


def test_rotation_step(measure: Callable[..., None]) -> None:
    d = 384
    rotation = torch.linalg.qr(torch.randn(TASKS, d, d)).Q
    gradient = torch.randn(TASKS, d, d) / d**0.5

    def check(result: tuple[torch.Tensor, torch.Tensor]) -> None:
        gram = result[0].double().mT @ result[0].double()
        assert (gram - torch.eye(d, dtype=torch.float64)).norm() <= 1e-4

    measure(
        f"{TASKS} × {d}×{d}",
        "torch",
        rotation.dtype,
        lambda: ops.rotation_step(rotation, gradient, rate=0.1),
        check,
        3 * rotation.nbytes,
        TASKS * (3 + 8 * 3) * 2 * d**3,
    )
