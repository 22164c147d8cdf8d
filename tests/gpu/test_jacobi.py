"""The Jacobi kernels on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from dirmerge import backends, cuda, ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch"),
    pytest.mark.skipif(bool(cuda.missing()), reason=cuda.missing() or "the CUDA library is there"),
]
ROUNDING = {torch.float32: 4e-7, torch.float64: 1e-15}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(500, 16, 16), (3, 128, 128), (7, 33, 20), (20, 333), (4, 20_000, 64), (1, 9), (0, 5, 4)],
    ids=str,
)
def test_jacobi_svd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.randn(shape, device="cuda", dtype=dtype)
    with backends.backend("native"):
        u, s, v, sweeps = ops.jacobi_svd(a)
    wide, k = a.double(), s.shape[-1]
    size = ROUNDING[dtype] * k**0.5
    residual = torch.linalg.matrix_norm(wide - (u.double() * s.double().unsqueeze(-2)) @ v.double().mT)
    assert (residual <= 4 * size * torch.linalg.matrix_norm(wide)).all()
    eye = torch.eye(k, device="cuda", dtype=torch.float64)
    for basis in (u.double(), v.double()):
        assert (torch.linalg.matrix_norm(basis.mT @ basis - eye) <= 4 * size * k**0.5).all()
    truth = torch.linalg.svdvals(wide)
    assert ((s - truth).norm(dim=-1) <= 4 * ROUNDING[dtype] * truth.norm(dim=-1)).all()
    assert (s.diff(dim=-1) <= 0).all()
    assert ((sweeps > 0) & (sweeps < 20)).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(500, 16, 16), (3, 128, 128), (7, 33, 33), (1, 1), (0, 5, 5)], ids=str)
def test_jacobi_eigh(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a = torch.randn(shape, device="cuda", dtype=dtype)
    a = a + a.mT
    with backends.backend("native"):
        values, w, sweeps = ops.jacobi_eigh(a)
    wide, n = a.double(), shape[-1]
    size = ROUNDING[dtype] * n**0.5
    residual = torch.linalg.matrix_norm(wide - (w.double() * values.double().unsqueeze(-2)) @ w.double().mT)
    assert (residual <= 4 * size * torch.linalg.matrix_norm(wide)).all()
    eye = torch.eye(n, device="cuda", dtype=torch.float64)
    assert (torch.linalg.matrix_norm(w.double().mT @ w.double() - eye) <= 4 * size * n**0.5).all()
    assert ((sweeps > 0) & (sweeps < 20)).all()


def test_special_matrices() -> None:
    a = torch.zeros(5, 40, 24, device="cuda")
    a[1] = 1
    a[2] = torch.linalg.qr(torch.randn(40, 24, device="cuda")).Q
    a[3] = torch.randn(40, 24, device="cuda") * torch.logspace(0, -20, 24, device="cuda")
    a[4, 7, 3] = torch.nan
    with backends.backend("native"):
        u, s, v, sweeps = ops.jacobi_svd(a)
    assert s[4].isnan().all()
    assert sweeps[4] == -1
    for basis in (u[:4], v[:4]):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(24, device="cuda").expand(4, 24, 24))
    truth = torch.linalg.svdvals(a[:4].double())
    torch.testing.assert_close(s[:4].double(), truth, rtol=1e-5, atol=1e-5)
    assert (s[0] == 0).all()
