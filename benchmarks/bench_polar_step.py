"""polar_step: one quintic Newton–Schulz step on a tall matrix."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import LAYERS
from dirmerge import ops


@pytest.mark.parametrize("layer", ["MiniLM MLP", "ViT-L MLP"])
def test_polar_step(measure: Callable[..., None], layer: str) -> None:
    m, k = LAYERS[layer]
    x = torch.randn(m, k) / (2 * m**0.5)

    def check(result: torch.Tensor) -> None:
        gram = x.double().T @ x.double()
        truth = 15 / 8 * x[:64].double()
        truth += (x[:64].double() @ gram) @ (3 / 8 * gram - 10 / 8 * torch.eye(k, dtype=torch.float64))
        assert (result[:64].double() - truth).norm() <= 1e-5 * truth.norm()

    measure(
        f"{layer} {m}×{k}",
        "torch",
        x.dtype,
        lambda: ops.polar_step(x, 15 / 8, -10 / 8, 3 / 8),
        check,
        2 * x.nbytes,
        4 * m * k * k + 2 * k**3,
    )
