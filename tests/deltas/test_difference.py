"""Difference: the same numbers as the dense difference, without its memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dirmerge import Difference, linalg, merge_deltas
from dirmerge.methods import Tasks, factor_tasks


def weights(m, n, generator, dtype=torch.bfloat16):
    base = torch.randn(m, n, generator=generator).to(dtype)
    return base, (base.float() + 0.02 * torch.randn(m, n, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_product_is_that_of_the_dense_difference(dtype, transposed, generator):
    base, tuned = weights(70, 33, generator, dtype)
    truth = tuned.double() - base.double()
    delta = Difference(tuned, base)
    if transposed:
        truth, delta = truth.mT, delta.mT
    m, n = truth.shape
    tight = 1e-13 if dtype == torch.float64 else 1e-6
    assert delta.shape == truth.shape
    assert delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(delta.dense().double(), truth, rtol=tight, atol=0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    product = delta @ x.to(delta.dtype)
    assert (product.double() - truth @ x).norm() <= 10 * tight * truth.norm() * x.norm()
    gram, total = delta.gram(torch.float64)
    assert (gram - truth.mT @ truth).norm() <= 10 * tight * truth.square().sum()
    assert float(total) == pytest.approx(float(truth.square().sum()), rel=10 * tight)
    sketch, energy = delta.sketch(7, seed=3)
    assert sketch.shape == (m, 7)
    assert float(energy) == pytest.approx(float(truth.square().sum()), rel=10 * tight)
    added = torch.ones(m, n, dtype=torch.float64)
    delta.add_to_(added, 2.0)
    torch.testing.assert_close(added, 1 + 2 * truth, rtol=tight, atol=1e-6)


def test_pieces_cover_what_one_piece_does(generator, monkeypatch):
    base, tuned = weights(50, 30, generator)
    whole = Difference(tuned, base)
    expected = [whole.gram(torch.float32)[0], whole.mT.gram(torch.float32)[0]]
    monkeypatch.setattr("dirmerge.deltas.difference._PIECE", 95)  # three rows, and one or two at the end
    torch.testing.assert_close(whole.gram(torch.float32)[0], expected[0])
    torch.testing.assert_close(whole.mT.gram(torch.float32)[0], expected[1])
    added = torch.zeros(50, 30)
    whole.add_to_(added, 1.0)
    assert torch.equal(added, whole.dense())


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(260, 200), (200, 260), (20, 30)])
def test_svd_of_a_difference_is_that_of_the_dense_one(method, shape, generator):
    base, tuned = weights(shape[0], shape[1], generator, torch.float32)
    delta = Difference(tuned, base)
    expected = linalg.svd_truncated(delta.dense(), 6, method, seed=1)
    found = linalg.svd_truncated(delta, 6, method, seed=1)
    assert found.power_iterations == expected.power_iterations
    torch.testing.assert_close(found.s, expected.s, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0)
    assert (found.dense() - expected.dense()).norm() <= 2e-3 * expected.s.norm()


@pytest.mark.parametrize(
    "method", ["dc_merge", "tsv_m", "mda", "iso_c", "iso_cts", "ties", "task_arithmetic", "average"]
)
def test_methods_take_differences(method, generator):
    base, first = weights(40, 30, generator)
    second = (base.float() + 0.02 * torch.randn(40, 30, generator=generator)).bfloat16()
    lazy = merge_deltas([Difference(first, base), Difference(second, base)], method)
    dense = merge_deltas([first.float() - base.float(), second.float() - base.float()], method)
    torch.testing.assert_close(lazy.dense(), dense.dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_batch_is_its_tasks_one_by_one(transposed, generator):
    base, first = weights(260, 210, generator)
    second = (base.float() + 0.01 * torch.randn(260, 210, generator=generator)).bfloat16()
    batch = Difference((first, second), base, transposed)
    singles = [Difference(w, base, transposed) for w in (first, second)]
    assert batch.shape == (2, *singles[0].shape)
    torch.testing.assert_close(batch.dense(), torch.stack([s.dense() for s in singles]))
    for method in ("exact", "randomized"):
        found = linalg.svd_truncated(batch, 5, method, seed=2, power_iterations=2)
        for own, single in zip(found.unbind(), singles, strict=True):
            expected = linalg.svd_truncated(single, 5, method, seed=2, power_iterations=2)
            torch.testing.assert_close(own.s, expected.s, rtol=1e-5, atol=0)
            torch.testing.assert_close(own.total, expected.total)
            torch.testing.assert_close(own.dense(), expected.dense(), rtol=0, atol=1e-4)
    total = torch.zeros(batch.shape[1:])
    batch.add_to_(total, 0.5)
    torch.testing.assert_close(total, 0.5 * batch.dense().sum(0))
    with pytest.raises(ValueError, match="a batch of 2"):
        merge_deltas([batch], "tsv_m")


def test_tasks_on_an_accelerator_are_decomposed_as_one_batch(generator, monkeypatch):
    base, first = weights(40, 30, generator)
    second = (base.float() + 0.02 * torch.randn(40, 30, generator=generator)).bfloat16()
    deltas = [Difference(first, base), Difference(second, base)]
    options: dict[str, Any] = {"loaders": [lambda d=d: d for d in deltas], "ranks": [None, None]}
    calls = []

    def counted(a, *args, **kwargs):
        calls.append(tuple(a.shape))
        return linalg.svd_truncated(a, *args, **kwargs)

    monkeypatch.setattr("dirmerge.methods.spectral.svd_truncated", counted)
    one_by_one = factor_tasks(Tasks((40, 30), **options), [6, 4], "exact", 1e-2, 0)
    # No accelerator is needed to take its road: the weights stay where they are.
    tasks = Tasks((40, 30), **options, device=torch.device("cuda"))
    batched = factor_tasks(tasks, [6, 4], "exact", 1e-2, 0)
    assert calls == [(40, 30), (40, 30), (2, 40, 30)]
    assert batched.ranks == [6, 4]
    for own, expected in zip(batched.s, one_by_one.s, strict=True):
        torch.testing.assert_close(own, expected)
    assert batched.energy == pytest.approx(one_by_one.energy)


def test_what_is_not_finite_or_does_not_fit_is_an_error(generator):
    base, tuned = weights(300, 200, generator, torch.float32)
    far = Difference(torch.full_like(base, 3e38), torch.full_like(base, -3e38))
    for use in (
        lambda: far.dense(),
        lambda: far.sketch(4, 0),
        lambda: far.gram(torch.float32),
        lambda: far.add_to_(torch.zeros(300, 200), 1.0),
        lambda: linalg.svd_truncated(far, 4, "randomized"),
        lambda: linalg.svd_truncated(far, 4, "exact"),
        lambda: merge_deltas([far], "task_arithmetic"),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            use()
    with pytest.raises(ValueError, match="same shape"):
        Difference(tuned, base[:, 1:])
    with pytest.raises(ValueError, match="must be finite"):
        merge_deltas([Difference(tuned * float("nan"), base)], "task_arithmetic")


def peak_above_the_present(run) -> int:
    """Bytes by which the resident memory of this process rises above the present while run() works.

    The least of three runs: buffers that libraries take once are not the code's.
    """
    status = Path("/proc/self/status")
    run()
    rises = []
    for _ in range(3):
        present = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
        Path("/proc/self/clear_refs").write_text("5")
        run()
        rises.append(int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - present)
    return 1024 * min(rises)


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak by /proc")
def test_no_float32_matrix_is_formed_between_the_weights_and_the_factors(generator):
    m, n, rank = 6144, 4096, 16
    base, tuned = weights(m, n, generator)
    deltas = [Difference(tuned, base), Difference(base, tuned)]
    dense = 4 * m * n

    def run():
        merge_deltas(deltas, "tsv_m", rank=rank, svd="randomized")

    # Pieces of 4 MB, and some matrices of (m + n) · (rank + 16) or 2 rank columns.
    assert peak_above_the_present(run) < 0.4 * dense
    assert peak_above_the_present(lambda: deltas[0].dense()) > 0.9 * dense  # the measure sees one
