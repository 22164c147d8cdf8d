"""gram: Gram matrices of tall and of square matrices."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import LAYERS
from dirmerge import ops


@pytest.mark.parametrize("layer", ["MiniLM MLP", "ViT-L MLP"])
def test_gram(measure: Callable[..., None], layer: str) -> None:
    m, n = LAYERS[layer]
    x = torch.randn(m, n)

    def check(result: torch.Tensor) -> None:
        truth = x.double().T @ x[:, :64].double()
        assert (result[:, :64].double() - truth).norm() <= 1e-5 * truth.norm()

    moved = x.nbytes + 4 * n * n
    measure(f"{layer} {m}×{n}", "torch", x.dtype, lambda: ops.gram(x), check, moved, 2 * m * n * n)
