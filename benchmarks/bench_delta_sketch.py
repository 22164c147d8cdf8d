"""delta_sketch: eight fine-tunes of one layer times a random matrix, and the transposed product."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import LAYERS, TASKS
from dirmerge import ops
from dirmerge.ops.delta_sketch import random_signs


@pytest.mark.parametrize("layer", ["MiniLM MLP", "ViT-L MLP"])
@pytest.mark.parametrize("transposed", [False, True])
def test_delta_sketch(measure: Callable[..., None], layer: str, transposed: bool) -> None:
    m, n = LAYERS[layer]
    width = min(m, n) // TASKS + 16
    base = torch.randn(m, n).bfloat16()
    finetuned = [(base.float() + 0.01 * torch.randn(m, n)).bfloat16() for _ in range(TASKS)]

    def check(result: tuple[torch.Tensor, ...]) -> None:
        difference = (
            (finetuned[-1].double() - base.double()).T if transposed else finetuned[-1].double() - base
        )
        truth = difference[:64] @ random_signs(difference.shape[1], width, 0, dtype=torch.float64)
        assert (result[0][-1, :64].double() - truth).norm() <= 1e-5 * truth.norm()

    measure(
        f"{TASKS} × {layer} {m}×{n}{', transposed' if transposed else ''}",
        "torch",
        base.dtype,
        lambda: ops.delta_sketch(base, finetuned, width=width, transposed=transposed),
        check,
        (TASKS + 1) * base.nbytes,
        TASKS * 2 * m * n * width,
    )
