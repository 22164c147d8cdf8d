"""Every method on a GPU gives what it gives on the CPU: weights, adapters, and what is random in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dirmerge import Difference, LowRank, linalg, merge_deltas
from dirmerge.methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPTIONS: dict[str, dict[str, Any]] = {
    "dc_merge": {"smoothing": "linear"},
    "mda": {"frame": "random"},
    "wudi": {"solver": "exact"},
}


def weights(generator: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = torch.randn(320, 260, generator=generator)
    return base, [base + 0.02 * torch.randn(320, 260, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("form", ["dense", "difference", "adapters"])
def test_methods(method: str, form: str, generator: torch.Generator) -> None:
    base, tuned = weights(generator)

    def deltas(device: str) -> list[torch.Tensor | Difference | LowRank]:
        if form == "adapters":
            made = torch.Generator().manual_seed(7)
            pairs = [
                (torch.randn(320, 8, generator=made), torch.randn(8, 260, generator=made)) for _ in tuned
            ]
            return [LowRank.from_lora(b.to(device), a.to(device)) for b, a in pairs]
        w0 = base.to(device)
        if form == "dense":
            return [w.to(device) - w0 for w in tuned]
        return [Difference(w.to(device), w0) for w in tuned]

    options = OPTIONS.get(method, {})
    expected = merge_deltas(deltas("cpu"), method, alignment=0.5, **options)
    found = merge_deltas(deltas("cuda"), method, alignment=0.5, **options)
    assert found.dense().is_cuda
    error = (found.dense().cpu() - expected.dense()).norm() / expected.dense().norm()
    # A filter and an election are steps: an entry near a threshold may fall on its other side.
    assert float(error) < (2e-2 if method in ("dc_merge", "ties", "iso_cts") else 2e-3)
    assert found.record.scale == pytest.approx(expected.record.scale, rel=1e-2)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_svd(method: Any, generator: torch.Generator) -> None:
    base, tuned = weights(generator)
    batch = Difference(tuple(w.cuda() for w in tuned), base.cuda())
    found = linalg.svd_truncated(batch, 20, method, seed=3, power_iterations=2)
    for own, w in zip(found.unbind(), tuned, strict=True):
        expected = linalg.svd_truncated(w - base, 20, method, seed=3, power_iterations=2)
        torch.testing.assert_close(own.s.cpu(), expected.s, rtol=1e-4, atol=0)
        torch.testing.assert_close(own.energy.cpu(), expected.energy, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["auto", "exact", "newton_schulz"])
@pytest.mark.parametrize("shape", [(300, 300), (3000, 1100)])
def test_polar(method: Any, shape: tuple[int, int], generator: torch.Generator) -> None:
    x = torch.randn(*shape, generator=generator)
    x += 2 * torch.eye(*shape) * shape[1] ** 0.5  # well conditioned
    found = linalg.polar(x.cuda(), method)
    assert found.fallback is None
    assert float((found.q.cpu() - linalg.polar(x, "exact").q).norm()) < 1e-4 * shape[1] ** 0.5
    assert float(found.residual) < 2e-5
