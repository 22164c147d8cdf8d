"""jacobi_svd: the cores of eight adapters, and many small ones."""

from collections.abc import Callable

import pytest
import torch

from dirmerge import ops


@pytest.mark.parametrize(("batch", "m", "n"), [(8, 128, 128), (256, 16, 16), (64, 512, 16)], ids=str)
def test_jacobi_svd(measure: Callable[..., None], batch: int, m: int, n: int) -> None:
    a = torch.randn(batch, m, n)

    def check(result: tuple[torch.Tensor, ...]) -> None:
        u, s, v, _ = result
        assert ((u * s.unsqueeze(-2)) @ v.mT - a).norm() <= 1e-5 * a.norm()
        truth = torch.linalg.svdvals(a.double())
        assert (s.double() - truth).norm() <= 1e-6 * truth.norm()

    # One sweep of one-sided Jacobi, 6 m multiply-adds per pair of columns; LAPACK's count is of that order.
    measure(
        f"{batch} × {m}×{n}",
        "torch",
        a.dtype,
        lambda: ops.jacobi_svd(a),
        check,
        2 * a.nbytes,
        batch * 6 * m * n * n,
    )
