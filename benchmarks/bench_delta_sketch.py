"""delta_sketch: eight fine-tunes of one layer times a random matrix, and the transposed product."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import competitors
from benchmarks.shapes import TASKS, Layer
from dirmerge import ops
from dirmerge.ops.delta_sketch import random_signs

OP, CUPY = "delta_sketch", True


@pytest.mark.parametrize("transposed", [False, True], ids=["W Ω", "Wᵀ Ω"])
def test_delta_sketch(
    measure: Callable[..., None],
    affordable: Callable[[float], None],
    layer: Layer,
    transposed: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    m, n = layer.m, layer.n
    width = min(m, n) // TASKS + 16
    flops = TASKS * 2 * m * n * width
    affordable(flops)
    base = torch.randn(m, n).to(dtype)
    finetuned = [(base.float() + 0.01 * torch.randn(m, n)).to(dtype) for _ in range(TASKS)]
    test = random_signs(m if transposed else n, width, 0)

    def check(result: tuple[torch.Tensor, ...]) -> None:
        value = result[0] if isinstance(result, tuple) else result
        difference = finetuned[-1].double() - base.double()
        truth = (difference.T if transposed else difference)[:64] @ test.double()
        assert (value[-1, :64].double() - truth).norm() <= 1e-5 * truth.norm()

    rows = n if transposed else m
    measure(
        f"{TASKS} × {layer}{', transposed' if transposed else ''}",
        backend,
        dtype,
        lambda: ops.delta_sketch(base, finetuned, width=width, transposed=transposed),
        check,
        (TASKS + 1) * base.nbytes + 4 * TASKS * rows * width,
        flops,
        cupy=(competitors.delta_sketch, [base, finetuned, test, transposed]),
    )
