"""Deferred decisions: what is taken for granted is noted, read once, and done again where it did not hold."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from dirmerge.linalg import all_finite, kept_directions, polar, svd_truncated
from dirmerge.linalg._common import orthonormal
from dirmerge.linalg.conditions import careful, deferred, holds, is_deferred, number, optimistic, read

YES, NO = torch.tensor([True, True]), torch.tensor([True, False])


def test_decisions_are_read_where_nothing_is_deferred():
    assert holds(YES)
    assert not holds(NO)
    assert number(torch.tensor(0.5)) == 0.5
    with deferred() as ledger:  # nothing waits for a CPU
        assert holds(YES)
        assert not holds(NO)
        assert isinstance(number(torch.tensor(0.5)), float)
    assert len(ledger) == 0
    assert bool(ledger.flag())


def test_decisions_about_a_device_are_noted():
    away = torch.zeros(3, dtype=torch.bool, device="meta")  # a device whose values cannot be read at all
    with pytest.raises(RuntimeError):
        holds(away)
    with deferred() as ledger:
        assert is_deferred(away)
        assert holds(away)
        assert holds(away[0])
        assert cast(torch.Tensor, number(torch.zeros((), device="meta"))).dtype == torch.float64
    assert len(ledger) == 2
    assert ledger.flag().shape == ()
    assert ledger.flag().device.type == "meta"
    assert not is_deferred(away)


@pytest.mark.parametrize(("noted", "expected"), [([YES, YES[0]], True), ([YES, NO, YES], False)])
def test_the_flag_is_whether_all_hold(noted, expected):
    with deferred(on_cpu=True) as ledger:
        for condition in noted:
            assert holds(condition)
    assert bool(ledger.flag()) is expected
    assert bool(ledger.flag()) is expected


def test_ledgers_do_not_learn_from_inner_ones():
    with deferred(on_cpu=True) as outer:
        with deferred(on_cpu=True) as inner:
            assert holds(NO)
        with careful():
            assert not holds(NO)
            assert not is_deferred(NO)
        assert is_deferred(NO)
    assert len(outer) == 0
    assert not bool(inner.flag())


def test_numbers_are_read_together():
    values: list[torch.Tensor | float] = [
        torch.tensor(True),
        0.25,
        torch.tensor(7),
        torch.tensor(0.1, dtype=torch.float64),
    ]
    assert read(values) == [1.0, 0.25, 7.0, 0.1]
    assert read([]) == []


def test_only_what_did_not_hold_is_repeated():
    calls = []

    def work(name: str, condition: torch.Tensor) -> list[Any]:
        calls.append(name)
        answer = "optimistic" if holds(condition) else "careful"
        return [answer, number(torch.tensor(float(len(name))))]

    def breaks() -> list[Any]:
        if holds(NO):
            torch.linalg.cholesky(-torch.eye(2))
        return ["careful", 0.0]

    runs = [lambda: work("a", YES), lambda: work("bb", NO), breaks, lambda: work("ccc", YES)]
    results, again = optimistic(
        runs, lambda found: [found[1]], lambda found, own: [found[0], *own], on_cpu=True
    )
    assert again == [False, True, True, False]
    assert results == [["optimistic", 1.0], ["careful", 2.0], ["careful", 0.0], ["optimistic", 3.0]]
    assert [type(found[1]) for found in results] == [float] * 4
    assert calls == ["a", "bb", "ccc", "bb"]


def test_an_error_of_the_careful_run_is_raised():
    def run() -> None:
        if not holds(NO):
            raise ValueError("x must be finite")

    with pytest.raises(ValueError, match="must be finite"):
        optimistic([run], lambda _: [], lambda found, _: found, on_cpu=True)


def test_values_are_taken_for_finite_and_ranks_for_full():
    bad, s = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.5, 1e-9])
    assert not all_finite(bad)
    assert kept_directions(s, 100, 3) == 2
    with deferred(on_cpu=True) as ledger:
        assert all_finite(bad)
    assert not bool(ledger.flag())
    with deferred(on_cpu=True) as ledger:
        assert kept_directions(s, 100, 5) == 3
    assert not bool(ledger.flag())
    with deferred(on_cpu=True) as ledger:
        assert kept_directions(s, 100, 2) == 2
        assert all_finite(torch.full((4,), 6e4, dtype=torch.float16))  # its sum leaves float16
    assert bool(ledger.flag())


@pytest.mark.parametrize("shape", [(40, 40), (70, 33), (33, 70), (2, 199, 130)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4])
def test_the_deferred_polar_factor_is_as_accurate_as_the_exact_one(shape, smallest, generator):
    k = min(shape[-2:])
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator).double(), full_matrices=False)
    x = ((u * torch.logspace(0, torch.tensor(smallest).log10(), k)) @ vh).float()
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    truth = u @ vh
    direct = polar(x, "exact", complete=False)
    with deferred(on_cpu=True) as ledger:
        found = polar(x, "exact", complete=False)
    assert bool(ledger.flag())
    assert (found.rank == k).all()
    assert (found.residual < 1e-5).all()
    assert (found.q - truth).norm() <= 2 * (direct.q - truth).norm() + 1e-6 * k**0.5


@pytest.mark.parametrize(("m", "k", "rank"), [(70, 33, 20), (33, 33, 0), (199, 130, 129)])
def test_the_deferred_polar_factor_of_a_rank_deficient_matrix(m, k, rank, generator):
    x = torch.randn(m, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    expected = polar(x, "exact", complete=False)
    with deferred(on_cpu=True) as ledger:
        found = polar(x, "exact", complete=False)
    assert bool(ledger.flag())
    assert int(found.rank) == int(expected.rank) == rank
    torch.testing.assert_close(found.q, expected.q, rtol=0, atol=1e-4)
    # To complete it is a decision.
    with deferred(on_cpu=True) as ledger:
        polar(x, "exact")
    assert not bool(ledger.flag())


def test_deferred_newton_schulz_notes_whether_it_converged(generator):
    x = torch.randn(199, 70, generator=generator)
    with deferred(on_cpu=True) as ledger:
        found = polar(x, "newton_schulz")
    assert bool(ledger.flag())
    assert found.method == "newton_schulz"
    assert float(found.residual) < 1e-5
    x[:, 1] = x[:, 0] + 1e-6 * x[:, 1]
    with deferred(on_cpu=True) as ledger:
        polar(x, "newton_schulz")
    assert not bool(ledger.flag())


def test_the_deferred_polar_factor_notes_where_float64_does_not_suffice(generator):
    u = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64)).Q
    for smallest, holds_good in ((1e-2, True), (3.5e-7, False)):  # the numerical rank ends at 2.4e-7
        x = (u * torch.tensor([1.0, smallest])) @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double()
        with deferred(on_cpu=True) as ledger:
            found = polar(x.float(), "exact", complete=False)
        assert int(found.rank) == 2
        assert bool(ledger.flag()) is holds_good


@pytest.mark.parametrize("shape", [(199, 150), (150, 199), (2, 170, 150)])
def test_deferred_power_iterations_stop_where_the_others_do(shape, generator):
    flat = torch.randn(shape, generator=generator)
    headed = flat.clone()
    headed[..., :4, :] *= 100
    for x, is_flat, is_enough in ((headed, False, True), (flat, False, False), (flat, True, True)):
        expected = svd_truncated(x, 5, "randomized", is_flat=is_flat)
        with deferred(on_cpu=True) as ledger:
            found = svd_truncated(x, 5, "randomized", is_flat=is_flat)
        assert bool(ledger.flag()) is is_enough
        assert found.power_iterations == (8 if is_flat else 3)
        if is_enough and len(shape) == 2:
            # The same subspace after as many iterations; the bases on the way are computed otherwise.
            error = torch.linalg.matrix_norm(found.dense() - expected.dense())
            assert float(error) < 1e-3 * float(torch.linalg.matrix_norm(expected.dense()))
            torch.testing.assert_close(found.gain, expected.gain, rtol=1e-2, atol=1e-6)
    with deferred(on_cpu=True) as ledger:  # iterations that the caller counts are nobody's condition
        found = svd_truncated(flat, 5, "randomized", power_iterations=1)
    assert bool(ledger.flag())
    assert found.power_iterations == 1


def test_deferred_bases_note_dependent_columns(generator):
    y = torch.randn(70, 33, generator=generator)
    with deferred(on_cpu=True) as ledger:
        q, r = orthonormal(y)
    assert bool(ledger.flag())
    torch.testing.assert_close(q @ r, y)
    y[:, 3] = y[:, 2]
    with deferred(on_cpu=True) as ledger:
        orthonormal(y)
    assert not bool(ledger.flag())


@pytest.mark.parametrize(("scale", "is_good"), [(1.0, True), (1e-18, False), (1e18, False)])
def test_the_deferred_exact_svd(scale, is_good, generator):
    x = scale * torch.randn(230, 200, generator=generator)
    expected = svd_truncated(x.double(), 20, "exact")
    with deferred(on_cpu=True) as ledger:
        found = svd_truncated(x, 20, "exact")
    assert bool(ledger.flag()) is is_good
    if is_good:
        torch.testing.assert_close(found.s.double(), expected.s, rtol=1e-5, atol=0)
