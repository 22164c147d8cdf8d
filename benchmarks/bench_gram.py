"""gram: Gram matrices of tall and of square matrices."""

from collections.abc import Callable

import torch

from benchmarks import competitors
from benchmarks.shapes import Layer
from dirmerge import ops

OP, CUPY = "gram", True


def test_gram(
    measure: Callable[..., None],
    affordable: Callable[[float], None],
    layer: Layer,
    dtype: torch.dtype,
    backend: str,
) -> None:
    m, n = layer.m, layer.n
    affordable(2 * m * n * n)
    x = torch.randn(m, n).to(dtype)

    def check(result: torch.Tensor) -> None:
        truth = x.double().T @ x[:, :64].double()
        assert (result[:, :64].double() - truth).norm() <= 1e-5 * truth.norm()

    measure(
        layer,
        backend,
        dtype,
        lambda: ops.gram(x),
        check,
        x.nbytes + 4 * n * n,
        # The upper triangle is enough.
        m * n * (n + 1),
        gemm=dtype if backend == "triton" else None,
        cupy=(competitors.gram, [x]),
    )
