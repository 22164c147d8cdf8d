"""The alignment a(D): its formula, its linearity, and the λ that follows from it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import dirmerge
from dirmerge import LowRank
from dirmerge.methods import METHODS, AlignmentTerms, Scale, Tasks, get_method, merge_tasks
from dirmerge.methods.scale import alignment_terms


def tasks_of(deltas):
    ranks = [d.rank if isinstance(d, LowRank) else None for d in deltas]
    return Tasks(tuple(deltas[0].shape), [partial(lambda d: d, d) for d in deltas], ranks)


@pytest.mark.parametrize("method", ["dc_merge", "tsv_m", "iso_c", "ties", "task_arithmetic", "mda"])
def test_alignment_by_its_formula(method, generator):
    deltas = [torch.randn(18, 24, generator=generator, dtype=torch.float64) for _ in range(3)]
    tasks = tasks_of(deltas)
    merged = merge_tasks(tasks, method, [1.0] * 3, {})
    numerator, denominator = alignment_terms(tasks, merged)
    expected_n = expected_d = 0.0
    for d in deltas:
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        core = u[:, :6].mT @ merged.dense() @ vh[:6].mT
        expected_n += float((core.diagonal() * s[:6]).sum())
        expected_d += float(s[:6].square().sum())
    assert numerator == pytest.approx(expected_n, rel=1e-9)
    assert denominator == pytest.approx(expected_d, rel=1e-9)


def test_target_is_reached_and_recorded(generator):
    loras = [
        LowRank(torch.randn(30, 4, generator=generator), None, torch.randn(20, 4, generator=generator))
        for _ in range(3)
    ]
    merged = dirmerge.merge_deltas(loras, "dc_merge", alignment=0.4)
    numerator, denominator = alignment_terms(tasks_of(loras), merged)
    assert numerator / denominator == pytest.approx(0.4, rel=1e-5)
    assert merged.record.alignment == pytest.approx(0.4, rel=1e-5)
    plain = dirmerge.merge_deltas(loras, "dc_merge")
    assert torch.allclose(merged.dense(), plain.dense() * merged.record.scale, rtol=1e-5, atol=1e-5)


def test_one_task_is_reproduced_by_its_own_update(generator):
    d = torch.randn(10, 12, generator=generator, dtype=torch.float64)
    numerator, denominator = alignment_terms(tasks_of([d]), merge_tasks(tasks_of([d]), "average", [1.0], {}))
    assert numerator == pytest.approx(denominator)


def test_weights_do_not_enter_but_absence_does(generator):
    deltas = [torch.randn(18, 24, generator=generator, dtype=torch.float64) for _ in range(3)]
    for method in ("tsv_m", "dc_merge", "task_arithmetic"):
        alone = dirmerge.merge_deltas(deltas[:2], method, alignment=0.5)
        absent = dirmerge.merge_deltas(deltas, method, alignment=0.5, weights=[1, 1, 0])
        doubled = dirmerge.merge_deltas(deltas, method, alignment=0.5, weights=[2, 2, 0])
        assert torch.allclose(absent.dense(), alone.dense(), atol=1e-9)
        assert torch.allclose(doubled.dense(), alone.dense(), atol=1e-9)


def test_scale_for_edges():
    assert AlignmentTerms(2.0, 4.0).scale_for(0.5) == pytest.approx(1.0)
    assert AlignmentTerms().scale_for(0.5) == 1.0
    with pytest.raises(ValueError, match="no scale reaches"):
        AlignmentTerms(-1.0, 4.0).scale_for(0.5)


def test_a_default_falls_with_the_number_of_tasks():
    scale = Scale(alignment=0.8, at_tasks=8)
    assert scale.for_tasks(8) == Scale(alignment=0.8)
    assert scale.for_tasks(32) == Scale(alignment=0.4)
    assert scale.for_tasks(2) == scale.for_tasks(1) == Scale(alignment=1.0)
    assert Scale(alignment=0.8).for_tasks(3) == Scale(alignment=0.8)
    assert Scale(value=0.3).for_tasks(3) == Scale(value=0.3)
    raw = Scale(value=0.4, at_tasks=8, power=1.0, limit=1.5)
    assert [raw.for_tasks(count).value for count in (1, 2, 4, 8, 16)] == [1.0, 1.5, 0.8, 0.4, 0.2]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_default_grows_with_the_number_of_tasks(name, adapters):
    found = [get_method(name).default_scale(adapters, count) for count in range(1, 33)]
    values = [scale.value or scale.alignment for scale in found]
    assert values[0] == 1  # one task alone is left as it is
    assert values[1:] == sorted(values[1:], reverse=True)
    assert 0 < values[-1] <= values[1] <= 1.5
