"""Methods with deferred decisions: no value is read on the way, and what did not hold is merged again."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dirmerge import Difference, LowRank, backend
from dirmerge.linalg.conditions import deferred, optimistic
from dirmerge.methods import METHODS, Tasks, merge_tasks
from dirmerge.methods.scale import alignment_terms

M, N, T = 230, 200, 4
RANDOMIZED = {"svd": "randomized", "rank": 12}
CASES = [
    *((method, {}) for method in ("average", "task_arithmetic", "ties", "wudi", "tsv_m", "dc_merge")),
    *((method, {}) for method in ("mda", "iso_c", "iso_cts", "whitened")),
    *((method, RANDOMIZED) for method in ("tsv_m", "dc_merge", "mda", "iso_c", "iso_cts", "whitened")),
    ("dc_merge", {"smoothing": "linear", "keep_per_rank": 3.0, "block_mask": False}),
    ("mda", {"frame": "random"}),
    ("wudi", {"solver": "exact"}),
    ("whitened", {"left_exponent": 1.0, "ridge": 0.0}),
]


class Reads(TorchDispatchMode):
    """Counts the values that Python reads from tensors, and with them the waits of a program on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return func(*args, **(kwargs or {}))


def full(generator):
    """Differences with a few strong directions and noise, as fine-tunes have."""
    base = torch.randn(M, N, generator=generator)
    stored, deltas = base.bfloat16(), []
    for _ in range(T):
        head = torch.randn(M, 6, generator=generator) @ torch.randn(6, N, generator=generator)
        tuned = base + 0.01 * head + 0.002 * torch.randn(M, N, generator=generator)
        deltas.append(Difference(tuned.bfloat16(), stored))
    return deltas


def adapters(generator):
    return [
        LowRank.from_lora(torch.randn(M, r, generator=generator), torch.randn(r, N, generator=generator))
        for r in (8, 8, 4, 8)
    ]


def doubled(deltas):
    return [
        delta.dense().double() if isinstance(delta, Difference) else delta.to(torch.float64)
        for delta in deltas
    ]


def full_float64(generator):
    return doubled(full(generator))


def as_tasks(deltas):
    ranks = [delta.rank if isinstance(delta, LowRank) else None for delta in deltas]
    return Tasks((M, N), [functools.partial(lambda x: x, delta) for delta in deltas], ranks)


def twice(deltas, method, options):
    """What an optimistic merge gives, whether it was repeated, and what a careful one gives."""

    def run():
        return merge_tasks(as_tasks(deltas), method, [1.0, 0.5, 1.0, 2.0], options)

    results, again = optimistic(
        [run],
        lambda merged: merged.record.energy,
        lambda merged, own: dataclasses.replace(
            merged, record=dataclasses.replace(merged.record, energy=list(own))
        ),
        on_cpu=True,
    )
    return results[0], again[0], run()


@pytest.mark.parametrize("make", [full, adapters, full_float64])
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_no_value_is_read_and_the_result_is_as_accurate(method, options, make, generator):
    deltas = make(generator)
    with backend("torch"):
        with Reads() as reads, deferred(on_cpu=True) as ledger:
            merged = merge_tasks(as_tasks(deltas), method, [1.0] * T, options)
            alignment_terms(as_tasks(deltas), merged)
        expected = merge_tasks(as_tasks(deltas), method, [1.0] * T, options)
    assert reads.count == 0
    assert bool(ledger.flag())
    truth = merge_tasks(as_tasks(doubled(deltas)), method, [1.0] * T, options).dense()
    error, careful = ((x.dense() - truth).norm() / truth.norm() for x in (merged, expected))
    assert error <= 2 * careful + 1e-6
    assert merged.record.ranks == expected.record.ranks
    assert [float(x) for x in merged.record.energy] == pytest.approx(expected.record.energy, rel=1e-5)


def test_reads_are_counted_where_they_are_made(generator):
    with backend("torch"), Reads() as reads:
        merge_tasks(as_tasks(full(generator)), "dc_merge", [1.0] * T, {})
    assert reads.count > 20


def test_every_method_is_among_the_cases():
    assert {
        name for name, method in METHODS.items() if method.function.__module__.startswith("dirmerge.")
    } == {method for method, _ in CASES}


def with_rank_deficient(deltas):
    thin = torch.zeros(M, N)
    thin[:3, :3] = torch.eye(3)
    zero = torch.zeros(M, N)
    return [*deltas[:3], Difference(thin, zero)]


def with_flat_spectra(deltas):
    noise = torch.Generator().manual_seed(1)
    base = torch.zeros(M, N)
    return [Difference(torch.randn(M, N, generator=noise), base) for _ in range(T)]


def with_dependent_factor(deltas):
    left = deltas[0].left.clone()
    left[:, 1] = left[:, 0]
    return [LowRank(left, None, deltas[0].right), *deltas[1:]]


@pytest.mark.parametrize(
    ("make", "change", "method", "options"),
    [
        (full, lambda deltas: deltas, "tsv_m", None),  # nothing is wrong: not repeated
        (full, with_rank_deficient, "dc_merge", {}),
        (full, with_rank_deficient, "iso_cts", {}),
        (full, lambda deltas: [*deltas[:3], Difference(deltas[0].base, deltas[0].base)], "wudi", {}),
        (full, lambda deltas: [*deltas[:3], deltas[0]], "tsv_m", {}),
        (full, with_flat_spectra, "tsv_m", {"svd": "randomized", "rank": 5}),
        (adapters, lambda deltas: [*deltas[:3], deltas[3].scaled(0.0)], "dc_merge", {}),
        (adapters, lambda deltas: [*deltas[:3], deltas[3].scaled(0.0)], "wudi", {"solver": "exact"}),
        (adapters, lambda deltas: [*deltas[:3], deltas[0]], "mda", {}),
        (adapters, with_dependent_factor, "whitened", {}),
    ],
)
def test_what_did_not_hold_is_merged_again(make, change, method, options, generator):
    found, again, expected = twice(change(make(generator)), method, options or {})
    assert again is (options is not None)
    if again:
        assert torch.equal(found.dense(), expected.dense())
        assert found.record == expected.record


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [name for name, _ in CASES[:10]])
def test_values_that_are_not_finite_do_not_pass(value, method, generator):
    deltas = full(generator)
    tuned = deltas[2].finetuned.clone()
    tuned[5, 7] = value
    deltas[2] = Difference(tuned, deltas[2].base)
    with pytest.raises(ValueError, match="must be finite"):
        twice(deltas, method, {})
