"""jacobi_svd: the cores of eight adapters, and many small ones."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import SMALL, Small
from dirmerge import ops

OP, DTYPES = "jacobi_svd", (torch.float32,)


@pytest.mark.parametrize("small", SMALL, ids=str)
def test_jacobi_svd(measure: Callable[..., None], small: Small, dtype: torch.dtype, backend: str) -> None:
    a = torch.randn(small.batch, small.m, small.n, dtype=dtype)

    def check(result: tuple[torch.Tensor, ...]) -> None:
        u, s, v, _ = result
        assert ((u * s.unsqueeze(-2)) @ v.mT - a).norm() <= 1e-5 * a.norm()
        truth = torch.linalg.svdvals(a.double())
        assert (s.double() - truth).norm() <= 1e-6 * truth.norm()

    # One sweep of one-sided Jacobi, 6 m multiply-adds per pair of columns; LAPACK's count is of that order.
    flops = small.batch * 6 * small.m * small.n**2
    measure(small, backend, dtype, lambda: ops.jacobi_svd(a), check, 2 * a.nbytes, flops)
