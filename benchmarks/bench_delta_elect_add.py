"""delta_elect_add: base plus the elected mean of three differences in one pass, against torch's passes."""

from collections.abc import Callable

import torch

from benchmarks.shapes import Layer
from dirmerge import ops
from dirmerge.ops import DeltaAdd

OP, CUPY = "delta_elect_add", False


def test_delta_elect_add(
    measure: Callable[..., None], layer: Layer, dtype: torch.dtype, backend: str
) -> None:
    shape = layer.m, layer.n
    base = torch.randn(shape).to(dtype)
    weights = [(base.float() + 0.01 * torch.randn(shape)).to(dtype) for _ in range(3)]
    thresholds, election_weights = torch.full((3,), 0.01), [1.0, 1.0, 1.0]

    def check(result: DeltaAdd) -> None:
        differences = torch.stack([weight.float() - base.float() for weight in weights])
        merged = ops.elect_merge(differences, thresholds, election_weights)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.value.float(), base.float() + merged, rtol=eps, atol=1e-6)
        assert result.nonfinite == 0

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.delta_elect_add(base, weights, thresholds, election_weights, scale=1.0),
        check,
        base.numel() * 5 * dtype.itemsize,
    )
