from __future__ import annotations

import pytest
import torch

from dirmerge.ops.jacobi_svd import jacobi_svd

OP = "jacobi_svd"
SHAPES = [(12, 12), (2, 3, 70, 33), (33, 70), (1, 9), (9, 1), (2, 128, 200), (0, 5, 4), (2, 0, 4), (4, 0)]


def rounding(dtype: torch.dtype) -> float:
    return 2e-15 if dtype == torch.float64 else 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_decomposition(dtype_of_backend: torch.dtype, shape: tuple[int, ...]) -> None:
    a = torch.randn(shape).to(dtype_of_backend)
    found = jacobi_svd(a)
    wide, k = a.double(), min(shape[-2:])
    u, s, v = found.u.double(), found.s.double(), found.v.double()
    unit, scale = rounding(dtype_of_backend), max(shape[-2:]) ** 0.5
    assert (wide - (u * s.unsqueeze(-2)) @ v.mT).norm() <= unit * scale * wide.norm()
    for basis in (u, v):
        assert (basis.mT @ basis - torch.eye(k, dtype=torch.float64)).norm() <= unit * scale * max(
            s.numel() ** 0.5, 1
        )
    truth = torch.linalg.svdvals(wide)
    assert (s - truth).norm() <= unit * truth.norm()
    assert (s.diff(dim=-1) <= 0).all()
    assert (found.sweeps >= 0).all()


def test_a_zero_matrix_has_orthonormal_bases(dtype_of_backend: torch.dtype) -> None:
    found = jacobi_svd(torch.zeros(6, 4, dtype=dtype_of_backend))
    assert (found.s == 0).all()
    eye = torch.eye(4, dtype=found.s.dtype)
    torch.testing.assert_close(found.u.mT @ found.u, eye)
    torch.testing.assert_close(found.v.mT @ found.v, eye)


def test_nan_and_inf_stay_in_their_matrix(dtype_of_backend: torch.dtype) -> None:
    a = torch.randn(4, 7, 5).to(dtype_of_backend)
    expected = jacobi_svd(a)
    a[1, 3, 2] = torch.nan
    a[2, 0, 0] = -torch.inf
    found = jacobi_svd(a)
    for value, without in zip(found[:3], expected[:3], strict=True):
        assert value[1:3].isnan().all()
        assert torch.equal(value[::3], without[::3])
    assert (found.sweeps < 0).tolist() == [False, True, True, False]


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    a = torch.randn(4, 66, 40).to(dtype_of_backend)[::2, ::2].mT
    assert torch.equal(jacobi_svd(a).s, jacobi_svd(a.contiguous()).s)


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="must have dtype"):
        jacobi_svd(torch.ones(3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="must have shape"):
        jacobi_svd(torch.ones(3))
    with pytest.raises(ValueError, match=r"must be at most 128, got \(129, 130\)"):
        jacobi_svd(torch.ones(129, 130))
