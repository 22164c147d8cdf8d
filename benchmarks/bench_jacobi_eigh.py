"""jacobi_eigh: Gram matrices of the cores of eight adapters, and many small ones."""

from collections.abc import Callable

import pytest
import torch

from dirmerge import ops


@pytest.mark.parametrize(("batch", "n"), [(8, 128), (256, 16)], ids=str)
def test_jacobi_eigh(measure: Callable[..., None], batch: int, n: int) -> None:
    x = torch.randn(batch, 2 * n, n)
    a = x.mT @ x

    def check(result: tuple[torch.Tensor, ...]) -> None:
        values, w, _ = result
        assert ((w * values.unsqueeze(-2)) @ w.mT - a).norm() <= 1e-5 * a.norm()
        truth = torch.linalg.eigvalsh(a.double()).flip(-1)
        assert (values.double() - truth).norm() <= 1e-6 * truth.norm()

    measure(
        f"{batch} × {n}×{n}",
        "torch",
        a.dtype,
        lambda: ops.jacobi_eigh(a),
        check,
        2 * a.nbytes,
        batch * 6 * n**3,
    )
