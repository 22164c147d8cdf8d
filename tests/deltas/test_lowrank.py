"""LowRank against the dense float64 product."""

from __future__ import annotations

import pytest
import torch

from dirmerge import LowRank


def sample(generator, m=33, n=21, k=5, core=True, dtype=torch.float64):
    left, right = (torch.randn(size, k, generator=generator, dtype=dtype) for size in (m, n))
    return LowRank(left, torch.randn(k, k, generator=generator, dtype=dtype) if core else None, right)


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), [(33, 21, 5), (1, 9, 3), (9, 1, 2), (4, 4, 9), (6, 5, 0)])
def test_every_operation_equals_its_dense_form(core, m, n, k, generator):
    x = sample(generator, m, n, k, core)
    dense = x.left @ (x.core if core else torch.eye(k, dtype=torch.float64)) @ x.right.mT
    assert x.shape == (m, n)
    assert torch.allclose(x.dense(), dense)
    left, right = x.folded()
    assert torch.allclose(left @ right.mT, dense)
    assert torch.allclose(x.T.dense(), dense.mT)
    assert torch.allclose(x.scaled(-2.5).dense(), -2.5 * dense)
    assert x.norm() == pytest.approx(float(dense.norm()), rel=1e-7, abs=1e-7)
    y = sample(generator, m, n, 2, not core)
    assert x.inner(y) == pytest.approx(float((dense * y.dense()).sum()), rel=1e-9, abs=1e-9)
    total = LowRank.sum([x, y.scaled(3.0)])
    assert total.rank == k + 2
    assert torch.allclose(total.dense(), dense + 3 * y.dense())


@pytest.mark.parametrize("core", [True, False])
def test_svd_is_that_of_the_product(core, generator):
    x = sample(generator, core=core, dtype=torch.float32)
    svd = x.svd()
    truth = x.to(torch.float64).dense()
    assert torch.allclose(svd.s.double(), torch.linalg.svdvals(truth)[:5], rtol=1e-5)
    assert float((svd.dense().double() - truth).norm() / truth.norm()) < 2e-6
    eye = torch.eye(5)
    assert torch.allclose(svd.u.mT @ svd.u, eye, atol=1e-5)
    assert torch.allclose(svd.v.mT @ svd.v, eye, atol=1e-5)


@pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e-5, 0.0])
def test_svd_of_tall_ill_conditioned_factors(ratio, generator):
    """Both roads to the triangular factors, and the border between them."""
    left, right = torch.randn(300, 6, generator=generator), torch.randn(200, 6, generator=generator)
    left[:, 3] = left[:, 2] + ratio * left[:, 3]
    svd = LowRank(left, None, right).svd()
    truth = left.double() @ right.double().mT
    assert float((svd.dense().double() - truth).norm() / truth.norm()) < 2e-6
    assert torch.allclose(
        svd.s.double(), torch.linalg.svdvals(truth)[:6], rtol=1e-5, atol=1e-5 * float(svd.s[0])
    )
    kept = svd.truncated(5)
    assert torch.allclose(kept.u.mT @ kept.u, torch.eye(5), atol=1e-5)
    assert torch.allclose(kept.v.mT @ kept.v, torch.eye(5), atol=1e-5)


def test_truncation_is_the_best_of_its_rank_and_reports_energy(generator):
    x = sample(generator)
    truncated, energy = x.truncate(2)
    s = torch.linalg.svdvals(x.dense())
    assert truncated.rank == 2
    assert float((truncated.dense() - x.dense()).norm()) == pytest.approx(float(s[2:5].norm()))
    assert energy == pytest.approx(float(s[:2].square().sum() / s.square().sum()))
    assert LowRank(x.left * 0, None, x.right).truncate(1)[1] == 1


def test_from_lora_is_scaled_b_a_in_float32(generator):
    b, a = torch.randn(8, 2, generator=generator).half(), torch.randn(2, 6, generator=generator).half()
    x = LowRank.from_lora(b, a, 0.5)
    assert x.dtype == torch.float32
    assert torch.allclose(x.dense(), 0.5 * b.float() @ a.float())


def test_parts_that_do_not_fit_are_refused():
    a = torch.ones(3, 2)
    with pytest.raises(ValueError, match="same number of columns"):
        LowRank(a, None, torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"core must have shape \(2, 2\)"):
        LowRank(a, torch.ones(3, 3), a)
    with pytest.raises(ValueError, match="dtype and device"):
        LowRank(a, None, a.double())
    with pytest.raises(ValueError, match="must be a matrix"):
        LowRank(a[0], None, a)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        LowRank([1.0], None, a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floating-point"):
        LowRank(a.long(), None, a.long())
    with pytest.raises(ValueError, match="same shape"):
        LowRank(a, None, a).inner(LowRank(a, None, torch.ones(5, 2)))
    with pytest.raises(ValueError, match="all terms"):
        LowRank.sum([LowRank(a, None, a), LowRank(a, None, torch.ones(5, 2))])
    with pytest.raises(ValueError, match="empty"):
        LowRank.sum([])
