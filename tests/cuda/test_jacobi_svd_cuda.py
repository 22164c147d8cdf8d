from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulation import CSRC, Emulated, compile_emulated

from dirmerge import cuda, ops

DTYPES = (torch.float32, torch.float64)


def errors(a: torch.Tensor, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> list[float]:
    """Relative residual, departure of u and v from orthonormal, relative error of s; float64 truth."""
    wide, u, s, v = a.double(), u.double(), s.double(), v.double()
    norm = wide.norm().clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(s.shape[-1], dtype=torch.float64)
    return [
        float((wide - (u * s.unsqueeze(-2)) @ v.mT).norm() / norm),
        float((u.mT @ u - eye).norm()),
        float((v.mT @ v - eye).norm()),
        float((s - torch.linalg.svdvals(wide)).norm() / norm),
    ]


def check(a: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    """Asserts shapes, order, convergence and errors of at most `factor` times torch's; returns the sweeps."""
    u, s, v, sweeps = cuda.jacobi_svd(a)
    expected = ops.jacobi_svd(a)
    for found, by_torch in zip((u, s, v, sweeps), expected, strict=True):
        assert found.dtype == by_torch.dtype
        assert found.shape == by_torch.shape
        assert found.is_contiguous()
    assert (s.diff(dim=-1) <= 0).all()
    assert (sweeps > 0).all()
    # Of a single column or a diagonal matrix torch's own errors vanish.
    rounding = torch.finfo(s.dtype).eps * s.numel() ** 0.5
    for ours, torchs in zip(errors(a, u, s, v), errors(a, *expected[:3]), strict=True):
        assert ours <= max(factor * torchs, rounding)
    return sweeps


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize(
    "shape", [(13, 13), (2, 33, 20), (2, 12, 40), (3, 2, 2), (5, 6, 3), (1, 9), (9, 1), (1, 1)], ids=str
)
def test_is_the_decomposition(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check(torch.randn(shape, dtype=dtype))


@pytest.mark.usefixtures("emulated")
def test_sixteen_bits_are_widened() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check(torch.randn(20, 11).to(dtype))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_size(dtype: torch.dtype) -> None:
    # Columns that are nearly orthogonal need few sweeps; the emulator takes its time for one.
    q = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64)).Q
    a = (q * torch.linspace(2, 1, 128) + 1e-4 * torch.randn(128, 128)).to(dtype)
    assert check(a) <= 6


@pytest.mark.usefixtures("each_order")
def test_views_are_read_by_their_strides() -> None:
    base = torch.randn(2, 3, 24, 18)
    for a in (base.mT, base[:, :, ::3, 5:], base.transpose(0, 1)[..., ::2], base[0, 0].expand(2, 24, 18)):
        kept = a.clone()
        check(a)
        assert torch.equal(a, kept)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("dtype", "decades"), [(torch.float32, 25), (torch.float64, 240)], ids=str)
def test_every_singular_value_of_a_graded_matrix_is_relatively_accurate(
    dtype: torch.dtype, decades: int
) -> None:
    truth = torch.logspace(0, -decades, 12, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(20, 12, dtype=torch.float64)).Q
    a = (q * truth)[:, torch.randperm(12)].to(dtype)
    for matrix in (a, a.mT):
        s = cuda.jacobi_svd(matrix)[1].double()
        assert ((s - truth).abs() <= 20 * torch.finfo(dtype).eps * truth).all()
        # What is special about it: LAPACK's are accurate relative to the largest.
        by_lapack = ops.jacobi_svd(matrix).s.double()
        assert not ((by_lapack - truth).abs() <= 0.1 * truth).all()


@pytest.mark.usefixtures("each_order")
def test_where_singular_values_vanish_the_bases_are_still_orthonormal() -> None:
    one_row = torch.zeros(8, 6)
    one_row[3] = torch.randn(6)
    two_columns = torch.zeros(9, 5)
    two_columns[:, 1::2] = torch.randn(9, 2)
    for a in (torch.zeros(6, 4), torch.zeros(4, 4), torch.ones(7, 5), one_row, two_columns, one_row.mT):
        check(a.double())
        check(a)
    assert cuda.jacobi_svd(two_columns)[1][2:].tolist() == [0, 0, 0]


@pytest.mark.usefixtures("emulated")
def test_rank_deficient_and_repeated() -> None:
    check(torch.randn(30, 4) @ torch.randn(4, 24))
    q = torch.linalg.qr(torch.randn(24, 24)).Q
    check(q)
    check(3 * q.repeat(1, 2))
    check((q * torch.tensor([2.0] * 12 + [1.0] * 12)) @ torch.linalg.qr(torch.randn(24, 24)).Q)
    check(torch.diag(torch.tensor([1.0, -3, 2, 0, 3])))


@pytest.mark.usefixtures("emulated")
def test_huge_and_tiny_scale() -> None:
    a = torch.randn(14, 9)
    for factor in (2.0**124, 2.0**-120, 2.0**-138):
        scaled = a * factor
        assert scaled.isfinite().all()
        u, s, v, sweeps = cuda.jacobi_svd(scaled)
        truth = torch.linalg.svdvals(scaled.double())
        # Below 2^-126 the numbers themselves have fewer digits.
        torch.testing.assert_close(s.double(), truth, rtol=1e-6, atol=2.0**-148)
        eye = torch.eye(9)
        torch.testing.assert_close(u.mT @ u, eye)
        torch.testing.assert_close(v.mT @ v, eye)
        assert sweeps > 0


@pytest.mark.usefixtures("each_order")
def test_nan_and_inf_stay_in_their_matrix() -> None:
    for dtype in DTYPES:
        a = torch.randn(4, 7, 5, dtype=dtype)
        expected = cuda.jacobi_svd(a)
        a[1, 3, 2] = torch.nan
        a[2, 0, 0] = -torch.inf
        found = cuda.jacobi_svd(a)
        for value, without in zip(found, expected, strict=True):
            assert torch.equal(value[::3], without[::3])
        assert all(value[1:3].isnan().all() for value in found[:3])
        assert found[3][1:3].tolist() == [-1, -1]


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize(("free", "held"), [(600, 0), (1200, 1), (1300, 2)])
def test_what_shared_memory_does_not_hold(free: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_SHARED_BYTES", cuda._SHARED_STATIC + free)
    assert cuda._in_shared(torch.device("cpu"), 13 * 12 * 4, 13 * 12 * 4) == held
    check(torch.randn(2, 12, 12))
    # A taller matrix is replaced by its triangular factor first.
    check(torch.randn(2, 400, 12))
    check(torch.randn(12, 400))


@pytest.mark.usefixtures("emulated")
def test_what_is_empty_stays_empty() -> None:
    for shape in ((0, 3, 4), (2, 3, 0), (2, 0, 3), (0, 0)):
        found, expected = cuda.jacobi_svd(torch.empty(shape)), ops.jacobi_svd(torch.empty(shape))
        assert [value.shape for value in found] == [value.shape for value in expected]
        assert not found[3].any()


def changed(emulated: Emulated, folder: Path, old: str, new: str) -> cuda.Library:
    """Compiles the kernel with one string of its sources replaced everywhere."""
    shutil.copytree(CSRC, folder / "csrc")
    files = [path for path in (folder / "csrc" / "cuda").glob("jacobi*.cuh") if old in path.read_text()]
    assert files
    for path in files:
        path.write_text(path.read_text().replace(old, new))
    sources = [folder / "csrc" / "cuda" / "jacobi_svd.cu"]
    rest = (emulated.folder / "library.cu.o",)
    return Emulated(compile_emulated(folder / "csrc", sources, folder / "build", rest)).library


def test_sweeps_that_do_not_suffice_show(
    emulated: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = changed(emulated, tmp_path, "MAX_SWEEPS = 40", "MAX_SWEEPS = 2")
    monkeypatch.setattr(cuda, "library", lambda: library)
    a = torch.randn(3, 20, 20)
    a[1] = torch.eye(20)
    u, s, v, sweeps = cuda.jacobi_svd(a)
    assert sweeps.tolist() == [-2, 1, -2]
    torch.testing.assert_close((u * s.unsqueeze(-2)) @ v.mT, a, rtol=0, atol=1e-5)
