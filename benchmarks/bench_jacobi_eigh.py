"""jacobi_eigh: Gram matrices of the cores of eight adapters, and many small ones."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import SMALL, Small
from dirmerge import ops

OP, DTYPES = "jacobi_eigh", (torch.float32,)


@pytest.mark.parametrize("small", SMALL[:2], ids=str)
def test_jacobi_eigh(measure: Callable[..., None], small: Small, dtype: torch.dtype, backend: str) -> None:
    n = small.n
    x = torch.randn(small.batch, 2 * n, n, dtype=dtype)
    a = x.mT @ x

    def check(result: tuple[torch.Tensor, ...]) -> None:
        values, w, _ = result
        assert ((w * values.unsqueeze(-2)) @ w.mT - a).norm() <= 1e-5 * a.norm()
        truth = torch.linalg.eigvalsh(a.double()).flip(-1)
        assert (values.double() - truth).norm() <= 1e-6 * truth.norm()

    flops = small.batch * 6 * n**3
    measure(small, backend, dtype, lambda: ops.jacobi_eigh(a), check, 2 * a.nbytes, flops)
