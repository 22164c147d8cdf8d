from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from dirmerge import Difference, LowRank
from dirmerge.diagnostics import measures
from dirmerge.linalg import polar, simplex_etf
from dirmerge.methods import Tasks, factor_tasks, kept_ranks, merge_tasks
from dirmerge.methods.scale import alignment_terms


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(m: int, r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(m, r, seed=seed)).Q


def stacked(m: int, ranks: list[int], seed: int = 0) -> tuple[Tensor, list[slice]]:
    """Random orthonormal bases side by side, and each one's columns."""
    edges = [0, *itertools.accumulate(ranks)]
    parts = [basis(m, r, seed + t) for t, r in enumerate(ranks)]
    return torch.cat(parts, 1), [slice(a, b) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (7, 7), (1, 5)])
def test_singular_values_are_those_of_lapack(shape):
    base, tuned = random(*shape, seed=1), random(*shape, seed=2)
    expected = torch.linalg.svdvals(tuned - base)
    for delta in (tuned - base, Difference(tuned, base)):
        torch.testing.assert_close(measures.singular_values(delta), expected, rtol=1e-7, atol=1e-7)
    low = LowRank(random(shape[0], 3, seed=3), random(3, 3, seed=4), random(shape[1], 3, seed=5))
    found = measures.singular_values(low)
    truth = torch.linalg.svdvals(low.dense())[: len(found)]
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_energy_of_a_known_spectrum():
    s = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])  # energies 9, 1, 1, 1 of 12
    assert measures.energy_directions(s, 0.75) == 1
    assert measures.energy_directions(s, 0.76) == 2
    assert measures.energy_directions(s, 1.0) == 4
    assert measures.energy_directions(s[:2], 0.9, total=12.0) is None
    assert measures.energy_directions(torch.zeros(3)) == 0
    assert measures.energy_curve(s) == pytest.approx([9 / 12, 10 / 12, 1.0])
    assert measures.energy_curve(s[:2], 12.0) == pytest.approx([9 / 12, 10 / 12])
    assert measures.energy_curve(torch.zeros(3)) == []
    assert measures.stable_rank(s) == pytest.approx(12 / 9)
    assert measures.stable_rank(s[:1], 12.0) == pytest.approx(12 / 9)
    assert measures.stable_rank(torch.ones(7)) == pytest.approx(7)
    assert measures.stable_rank(torch.zeros(3)) == 0
    with pytest.raises(ValueError, match="share must lie"):
        measures.energy_directions(s, 0.0)


def test_overlap_is_the_trace_of_the_projectors_product():
    u, v = basis(30, 4), basis(30, 7, 1)
    expected = float(torch.trace(u @ u.T @ v @ v.T)) / 4
    assert measures.subspace_overlap(u, v) == pytest.approx(expected, rel=1e-12)
    turned = v @ basis(7, 7, 2)
    assert measures.subspace_overlap(u, turned) == pytest.approx(expected, rel=1e-12)
    frame = basis(30, 12, 3)
    assert measures.subspace_overlap(frame[:, :5], frame[:, 5:]) == pytest.approx(0, abs=1e-28)
    assert measures.subspace_overlap(frame[:, :5], frame) == pytest.approx(1)
    with pytest.raises(ValueError, match="empty"):
        measures.subspace_overlap(u, v[:, :0])


def test_random_subspaces_overlap_as_much_as_chance_says():
    found = [measures.subspace_overlap(basis(40, 5, 2 * i), basis(40, 8, 2 * i + 1)) for i in range(200)]
    # 200 draws of a standard deviation below 0.03.
    assert sum(found) / 200 == pytest.approx(measures.chance_overlap(40, 5, 8), abs=0.008)


def test_principal_angles_of_a_known_rotation():
    angles = torch.tensor([0.1, 0.7, 1.3], dtype=torch.float64)
    frame = basis(10, 6)
    u = frame[:, :3]
    v = u * angles.cos() + frame[:, 3:] * angles.sin()
    torch.testing.assert_close(measures.principal_angles(u, v @ basis(3, 3, 1)), angles, rtol=1e-9, atol=0)
    assert float(measures.principal_angles(u, u).max()) < 1e-7
    assert measures.principal_angles(u, frame[:, 3:]).tolist() == pytest.approx([math.pi / 2] * 3)


def test_tables_of_pairs_are_those_of_each_pair():
    bases, blocks = stacked(25, [3, 0, 6, 4])
    found = measures.compare_spaces(bases, blocks)
    for i, j in itertools.product(range(4), range(4)):
        cells = [
            table[i][j] for table in (found.overlap, found.chance, found.mean_angle, found.smallest_angle)
        ]
        if 1 in (i, j):
            assert cells == [None] * 4
            continue
        a, b = bases[:, blocks[i]], bases[:, blocks[j]]
        angles = measures.principal_angles(a, b).rad2deg()
        expected = [
            measures.subspace_overlap(a, b),
            max(a.shape[1], b.shape[1]) / 25,
            float(angles.mean()),
            float(angles.min()),
        ]
        assert cells == pytest.approx(expected, rel=1e-9, abs=1e-5)


def test_interference_entry_by_entry():
    (u, _), (v, _) = stacked(12, [2, 3]), stacked(15, [2, 3], 5)
    s = random(5, seed=9).abs()
    expected = 0.0
    for a, b in itertools.product(range(5), range(5)):
        entry = sum(
            (float(u[:, a] @ u[:, c]) - (a == c)) * float(s[c]) * (float(v[:, c] @ v[:, b]) - (c == b))
            for c in range(5)
        )
        expected += abs(entry)
    assert measures.task_interference(u, s, v) == pytest.approx(expected, rel=1e-12)
    assert measures.task_interference(u, 3 * s, v) == pytest.approx(3 * expected, rel=1e-12)


def test_orthogonal_tasks_do_not_interfere_and_equal_ones_do():
    u, v, s = basis(20, 6), basis(18, 6, 1), torch.ones(6, dtype=torch.float64)
    (crossing, _) = stacked(18, [3, 3], 7)
    assert measures.task_interference(u, s, v) < 1e-12
    assert measures.task_interference(u, s, crossing) < 1e-12  # one orthogonal side is enough
    # Twice the same task: both cross Gram matrices are I, so the product has s_i once per direction and task.
    twice_u, twice_v = torch.cat([u[:, :3]] * 2, 1), torch.cat([v[:, :3]] * 2, 1)
    assert measures.task_interference(twice_u, s, twice_v) == pytest.approx(6.0)


def test_random_tasks_interfere_as_much_as_chance_says():
    ranks = [8, 12, 10]
    s = [torch.linspace(3, 0.5, r, dtype=torch.float64) for r in ranks]
    found = [
        measures.task_interference(
            stacked(90, ranks, 10 * i)[0], torch.cat(s), stacked(70, ranks, 10 * i + 5)[0]
        )
        for i in range(12)
    ]
    assert sum(found) / 12 == pytest.approx(measures.chance_interference(s, 90, 70), rel=0.04)


def test_response_of_dense_and_factored_updates():
    u, v = basis(14, 4), basis(11, 4, 1)
    low = LowRank(random(14, 3, seed=2), random(3, 3, seed=3), random(11, 3, seed=4))
    dense = low.dense()
    for delta in (low, dense):
        found = measures.response(delta, u, v)
        for i in range(4):
            image, back = dense @ v[:, i], dense.T @ u[:, i]
            assert float(found.diagonal[i]) == pytest.approx(float(u[:, i] @ image), rel=1e-10)
            assert float(found.right[i]) == pytest.approx(float(image.norm()), rel=1e-10)
            assert float(found.left[i]) == pytest.approx(float(back.norm()), rel=1e-10)


def similarity(delta: Tensor, u: Tensor, v: Tensor) -> float:
    return measures.directional_similarity(measures.response(delta, u, v), slice(None))


def test_directional_similarity_of_known_updates():
    frame_u, frame_v = basis(20, 9), basis(24, 9, 1)
    u, v, s = frame_u[:, :4], frame_v[:, :4], torch.tensor([9.0, 1.0, 0.1, 1e-3], dtype=torch.float64)
    own = (u * s) @ v.T
    other = frame_u[:, 4:] @ frame_v[:, 4:].T
    assert similarity(own, u, v) == pytest.approx(1)  # however little energy a direction has
    assert similarity(own + 50 * other, u, v) == pytest.approx(1)
    assert similarity(-own, u, v) == pytest.approx(-1)
    assert similarity(other, u, v) == 0  # maps every v_i to 0
    # Only the two leading directions survive: half of them count.
    assert similarity((u[:, :2] * s[:2]) @ v[:, :2].T, u, v) == pytest.approx(0.5)
    noisy = own + 0.3 * random(20, 24, seed=7)
    cosines = [
        float(u[:, i] @ noisy @ v[:, i])
        * (1 / float((noisy @ v[:, i]).norm()) + 1 / float((noisy.T @ u[:, i]).norm()))
        for i in range(4)
    ]
    assert similarity(noisy, u, v) == pytest.approx(sum(cosines) / 8, rel=1e-12)
    assert similarity(7 * noisy, u, v) == pytest.approx(sum(cosines) / 8, rel=1e-12)


@pytest.mark.parametrize("method", ["task_arithmetic", "dc_merge"])
def test_task_alignments_sum_to_the_alignment_of_the_merge(method):
    deltas = [random(12, 18, seed=t) for t in range(3)]
    tasks = Tasks((12, 18), [partial(lambda d: d, d) for d in deltas], [None] * 3)
    merged = merge_tasks(tasks, method, [1.0, 2.0, 0.5], {})
    factors = factor_tasks(tasks, kept_ranks(tasks), "exact", 1e-2, 0)
    found = measures.response(merged.value, factors.u, factors.v)
    energies = [float(s.square().sum()) for s in factors.s]
    parts = [
        measures.task_alignment(found, s, block) for s, block in zip(factors.s, factors.blocks(), strict=True)
    ]
    numerator, denominator = alignment_terms(tasks, merged)
    assert sum(energies) == pytest.approx(denominator, rel=1e-10)
    assert sum(a * e for a, e in zip(parts, energies, strict=True)) == pytest.approx(numerator, rel=1e-10)


def test_energy_outside_the_etf_subspace_by_its_projector():
    m, n, k = 16, 11, 5
    frame, signs = basis(m, k), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    vertices = simplex_etf(k, m, frame=frame * signs, dtype=torch.float64)
    projector = vertices @ torch.linalg.pinv(vertices)
    low = LowRank(random(m, 4, seed=2), None, random(n, 4, seed=3))
    expected = float((low.dense() - projector @ low.dense()).norm() / low.dense().norm())
    for delta in (low, low.dense()):
        assert measures.energy_outside_etf(delta, frame, signs) == pytest.approx(expected, rel=1e-10)
    assert measures.energy_outside_etf(projector @ low.dense(), frame, signs) < 1e-7
    assert measures.energy_outside_etf(torch.zeros(m, n, dtype=torch.float64), frame, signs) == 0


def test_of_the_shared_component_a_share_of_one_over_root_k_is_outside():
    (u, _), (v, _) = stacked(30, [3, 4]), stacked(25, [3, 4], 4)
    left, right = polar(u).q, polar(v).q
    share = (left * random(7, seed=8)) @ right.T
    signs = random(7, seed=9).sign()
    assert measures.energy_outside_etf(share, left, signs) == pytest.approx(1 / math.sqrt(7), rel=1e-9)


def test_sign_conflicts_entry_by_entry():
    deltas = random(4, 9, 7, seed=1)
    deltas[:, 2] = 0  # nobody changes this row
    deltas[1:, 3] = 0  # one task alone
    deltas[0, 4:] = 0
    conflicting = changed = 0
    chance, against, magnitude = 0.0, [0.0] * 4, [0.0] * 4
    for i, j in itertools.product(range(9), range(7)):
        values = [float(deltas[t, i, j]) for t in range(4)]
        present = sum(value != 0 for value in values)
        changed += present > 0
        conflicting += min(values) < 0 < max(values)
        chance += 1 - 2 ** (1 - present) if present else 0
        for t, value in enumerate(values):
            magnitude[t] += abs(value)
            against[t] += abs(value) if value * sum(values) < 0 else 0
    for rows in (9, 2):
        found = measures.sign_conflicts(deltas.split(rows, 1))
        assert found.share == pytest.approx(conflicting / changed)
        assert found.chance == pytest.approx(chance / changed)
        assert found.opposed == pytest.approx(sum(against) / sum(magnitude))
        assert found.opposed_by_task == pytest.approx(
            [a / b for a, b in zip(against, magnitude, strict=True)]
        )


def test_sign_conflicts_of_known_tasks():
    x = random(1, 40, 30, seed=3)
    agreeing = measures.sign_conflicts([torch.cat([x, 2 * x, 0.1 * x])])
    assert (agreeing.share, agreeing.opposed) == (0, 0)
    opposite = measures.sign_conflicts([torch.cat([x, -x])])
    assert (opposite.share, opposite.opposed) == pytest.approx((1, 0.5))
    assert opposite.opposed_by_task == pytest.approx([0.5, 0.5])
    independent = measures.sign_conflicts([random(8, 200, 100, seed=4)])
    assert independent.share == pytest.approx(independent.chance, abs=3e-3)
    assert independent.opposed == pytest.approx(0.5 * (1 - 1 / math.sqrt(8)), rel=0.01)
    nothing = measures.sign_conflicts([torch.zeros(2, 3, 3)])
    assert (nothing.share, nothing.chance, nothing.opposed, nothing.opposed_by_task) == (0, 0, 0, [0, 0])


def test_accumulation_of_orthogonal_and_of_equal_tasks():
    u, v = basis(20, 6), basis(20, 6, 1)
    spectra = [torch.tensor([5.0, 2.0, 1.0]).double(), torch.tensor([4.0, 3.0, 0.5]).double()]
    deltas = [(u[:, 3 * t : 3 * t + 3] * s) @ v[:, 3 * t : 3 * t + 3].T for t, s in enumerate(spectra)]
    found = measures.accumulation(torch.linalg.svdvals(sum(deltas)), spectra)
    assert found == pytest.approx([1.0] * 6)
    equal = measures.accumulation(torch.linalg.svdvals(4 * deltas[0]), [spectra[0]] * 4)
    assert equal[0] == pytest.approx(4)
    assert measures.accumulation(torch.zeros(3), [torch.zeros(3)]) == []
