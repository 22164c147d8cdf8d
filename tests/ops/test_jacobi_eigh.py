from __future__ import annotations

import pytest
import torch

from dirmerge.ops.jacobi_eigh import jacobi_eigh

OP = "jacobi_eigh"


@pytest.mark.parametrize(
    "shape", [(12, 12), (2, 3, 33, 33), (1, 1), (128, 128), (0, 5, 5), (2, 0, 0)], ids=str
)
def test_is_the_decomposition(dtype_of_backend: torch.dtype, shape: tuple[int, ...]) -> None:
    a = torch.randn(shape)
    a = (a + a.mT).to(dtype_of_backend)
    found = jacobi_eigh(a)
    wide, n = a.double(), shape[-1]
    values, w = found.values.double(), found.vectors.double()
    unit = 2e-15 if dtype_of_backend == torch.float64 else 1e-6
    assert (wide - (w * values.unsqueeze(-2)) @ w.mT).norm() <= unit * n**0.5 * wide.norm()
    eye = torch.eye(n, dtype=torch.float64)
    assert (w.mT @ w - eye).norm() <= unit * n**0.5 * max(values.numel() ** 0.5, 1)
    truth = torch.linalg.eigvalsh(wide).flip(-1)
    assert (values - truth).norm() <= unit * truth.norm()
    assert (values.diff(dim=-1) <= 0).all()
    assert (found.sweeps >= 0).all()


def test_reads_the_lower_triangle_only(dtype_of_backend: torch.dtype) -> None:
    a = torch.randn(9, 9).to(dtype_of_backend)
    whole = a.tril() + a.tril(-1).mT
    for found, expected in zip(
        jacobi_eigh(a.masked_fill(a.triu(1) != 0, torch.nan)), jacobi_eigh(whole), strict=True
    ):
        assert torch.equal(found, expected)


def test_nan_stays_in_its_matrix(dtype_of_backend: torch.dtype) -> None:
    a = torch.eye(5, dtype=dtype_of_backend).repeat(3, 1, 1)
    a[1, 3, 2] = torch.nan
    found = jacobi_eigh(a)
    assert found.values.isnan().all(-1).tolist() == [False, True, False]
    assert found.vectors.isnan().all(-1).all(-1).tolist() == [False, True, False]
    assert (found.sweeps < 0).tolist() == [False, True, False]
    assert (found.values[::2] == 1).all()


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="must have dtype"):
        jacobi_eigh(torch.ones(3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="must have shape"):
        jacobi_eigh(torch.ones(3, 4))
    with pytest.raises(ValueError, match="n must be at most 128, got 129"):
        jacobi_eigh(torch.ones(129, 129))
