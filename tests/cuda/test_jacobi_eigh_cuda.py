from __future__ import annotations

import pytest
import torch

from dirmerge import cuda, ops

DTYPES = (torch.float32, torch.float64)


def symmetric(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    a = torch.randn(shape, dtype=dtype)
    return a + a.mT


def errors(a: torch.Tensor, values: torch.Tensor, w: torch.Tensor) -> list[float]:
    """Relative residual, departure of w from orthogonal, relative error of the values; float64 truth."""
    wide, values, w = a.double(), values.double(), w.double()
    norm = wide.norm().clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(w.shape[-1], dtype=torch.float64)
    return [
        float((wide - (w * values.unsqueeze(-2)) @ w.mT).norm() / norm),
        float((w.mT @ w - eye).norm()),
        float((values - torch.linalg.eigvalsh(wide).flip(-1)).norm() / norm),
    ]


def check(a: torch.Tensor) -> torch.Tensor:
    """Asserts shapes, order, convergence and errors of at most twice torch's; returns the eigenvalues."""
    values, w, sweeps = cuda.jacobi_eigh(a)
    expected = ops.jacobi_eigh(a)
    for found, by_torch in zip((values, w, sweeps), expected, strict=True):
        assert found.dtype == by_torch.dtype
        assert found.shape == by_torch.shape
        assert found.is_contiguous()
    assert (values.diff(dim=-1) <= 0).all()
    assert (sweeps > 0).all()
    # Of a diagonal matrix torch's own errors vanish.
    rounding = 2 * torch.finfo(values.dtype).eps * values.numel() ** 0.5
    for ours, torchs in zip(errors(a, values, w), errors(a, *expected[:2]), strict=True):
        assert ours <= max(2 * torchs, rounding)
    return values


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("shape", [(13, 13), (2, 40, 40), (3, 2, 2), (5, 3, 3), (1, 1)], ids=str)
def test_is_the_decomposition(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check(symmetric(*shape, dtype=dtype))


@pytest.mark.usefixtures("emulated")
def test_the_largest_size_and_sixteen_bits() -> None:
    for dtype in DTYPES:
        check(symmetric(128, 128, dtype=dtype))
    for dtype in (torch.bfloat16, torch.float16):
        check(symmetric(11, 11).to(dtype))


@pytest.mark.usefixtures("each_order")
def test_reads_the_lower_triangle_by_its_strides() -> None:
    base = torch.randn(2, 3, 36, 36)
    for a in (base, base.mT, base[:, :, ::2, ::2], base.transpose(0, 1)[..., 3:15, 3:15]):
        whole = a.tril() + a.tril(-1).mT
        found = cuda.jacobi_eigh(torch.where(torch.ones_like(a).tril() > 0, a, torch.nan))
        for value, expected in zip(found, cuda.jacobi_eigh(whole), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.usefixtures("emulated")
def test_signs_ranks_and_repeated_values() -> None:
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    for dtype in DTYPES:
        pairs = (q * torch.tensor([1.0, -1] * 15, dtype=torch.float64)) @ q.mT
        values = check(pairs.to(dtype))
        torch.testing.assert_close(values, torch.tensor([1.0] * 15 + [-1] * 15, dtype=dtype))
        x = torch.randn(30, 6, dtype=dtype)
        check(x @ x.mT)
        check(-x @ x.mT)
        check(torch.ones(12, 12, dtype=dtype))
        check(torch.zeros(5, 5, dtype=dtype))
        check(torch.diag(torch.tensor([1.0, -3, 0, 3, 3], dtype=dtype)))
        # Its diagonal is zero: every rotation is by 45° at first.
        check(torch.ones(9, 9, dtype=dtype) - torch.eye(9, dtype=dtype))


@pytest.mark.usefixtures("emulated")
def test_every_eigenvalue_of_a_graded_definite_matrix_is_relatively_accurate() -> None:
    scale = torch.logspace(0, -4, 16, dtype=torch.float64)[torch.randperm(16)]
    q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    correlation = (q * torch.linspace(0.5, 1.5, 16, dtype=torch.float64)) @ q.mT
    a = (scale[:, None] * correlation * scale).float()
    truth = torch.linalg.eigvalsh(a.double()).flip(-1)
    values = cuda.jacobi_eigh(a)[0].double()
    assert ((values - truth).abs() <= 2e-6 * truth).all()
    assert not ((ops.jacobi_eigh(a).values.double() - truth).abs() <= 1e-3 * truth).all()


@pytest.mark.usefixtures("emulated")
def test_huge_and_tiny_scale() -> None:
    a = symmetric(14, 14)
    for factor in (2.0**123, 2.0**-120, 2.0**-138):
        scaled = a * factor
        assert scaled.isfinite().all()
        values, w, _ = cuda.jacobi_eigh(scaled)
        truth = torch.linalg.eigvalsh(scaled.double()).flip(-1)
        assert ((values.double() - truth).abs() <= 1e-6 * truth.abs().max() + 2.0**-149).all()
        torch.testing.assert_close(w.mT @ w, torch.eye(14))


@pytest.mark.usefixtures("each_order")
def test_nan_and_inf_stay_in_their_matrix() -> None:
    for dtype in DTYPES:
        a = symmetric(4, 7, 7, dtype=dtype)
        expected = cuda.jacobi_eigh(a)
        a[1, 3, 2] = torch.nan
        a[2, 6, 0] = -torch.inf
        found = cuda.jacobi_eigh(a)
        for value, without in zip(found, expected, strict=True):
            assert torch.equal(value[::3], without[::3])
        assert all(value[1:3].isnan().all() for value in found[:2])
        assert found[2][1:3].tolist() == [-1, -1]


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize(("kib", "held"), [(1, 0), (4, 1)])
def test_what_shared_memory_does_not_hold(kib: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_SHARED_BYTES", cuda._SHARED_STATIC + (kib << 10))
    assert cuda._in_shared(torch.device("cpu"), 26 * 27 * 4, 26 * 27 * 4) == held
    check(symmetric(2, 25, 25))


@pytest.mark.usefixtures("emulated")
def test_what_is_empty_stays_empty() -> None:
    for shape in ((0, 3, 3), (2, 0, 0)):
        found, expected = cuda.jacobi_eigh(torch.empty(shape)), ops.jacobi_eigh(torch.empty(shape))
        assert [value.shape for value in found] == [value.shape for value in expected]
