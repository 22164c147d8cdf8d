"""delta: difference, sum of squares and non-finite count, against torch's three passes."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import LAYERS
from dirmerge import ops
from dirmerge.ops import Delta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layer", ["MiniLM MLP", "LLaMA-7B attention", "LLaMA-7B MLP"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_delta(measure: Callable[..., None], layer: str, dtype: torch.dtype, backend: str) -> None:
    shape = LAYERS[layer]
    base = torch.randn(shape).to(dtype)
    finetuned = (base.float() + 0.01 * torch.randn(shape)).to(dtype)

    def check(result: Delta) -> None:
        truth = finetuned.double() - base.double()
        assert torch.equal(result.value, truth.float())
        torch.testing.assert_close(result.sum_of_squares, result.value.double().square().sum())
        assert result.nonfinite == 0

    moved = base.numel() * (2 * dtype.itemsize + 4)
    measure(
        f"{layer} {shape[0]}×{shape[1]}", backend, dtype, lambda: ops.delta(finetuned, base), check, moved
    )
