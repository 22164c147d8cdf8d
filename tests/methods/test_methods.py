"""Every method by its formula in float64, by invariants, and at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dirmerge
from dirmerge import LowRank
from dirmerge.methods import METHODS, Scale, Tasks, get_method, merge_tasks, register
from dirmerge.methods.spectral import balanced

SPECTRAL = ["dc_merge", "mda", "tsv_m", "iso_c", "iso_cts", "whitened"]
ALL = [*SPECTRAL, "wudi", "ties", "task_arithmetic", "average"]
FACTORED = [*SPECTRAL, "task_arithmetic", "average"]


def dense(generator, m=24, n=20, count=3, dtype=torch.float64):
    return [torch.randn(m, n, generator=generator, dtype=dtype) for _ in range(count)]


def adapters(generator, m=40, n=30, ranks=(3, 3, 3), dtype=torch.float64):
    return [
        LowRank.from_lora(
            torch.randn(m, r, generator=generator, dtype=dtype),
            torch.randn(r, n, generator=generator, dtype=dtype),
        )
        for r in ranks
    ]


def polar(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def test_the_promised_methods_are_registered():
    assert set(ALL) <= set(METHODS)
    for name in ALL:
        assert get_method(name).summary


def test_averages_and_sums(generator):
    a, b, c = dense(generator)
    assert torch.allclose(
        dirmerge.merge_deltas([a, b, c], "average", weights=[1, 2, 1]).dense(), (a + 2 * b + c) / 4
    )
    assert torch.allclose(
        dirmerge.merge_deltas([a, b], "task_arithmetic", weights=[1, -0.5]).dense(), a - 0.5 * b
    )
    vector = [torch.arange(5.0), torch.ones(5)]
    assert torch.allclose(dirmerge.merge_deltas(vector, "average").dense(), (vector[0] + 1) / 2)


def test_ties_by_hand():
    a = torch.tensor([[4.0, -1.0, 0.5, 3.0]])
    b = torch.tensor([[-3.0, -2.0, 4.0, 0.1]])
    # density 1/2 keeps {4, 3} of a and {4, −3} of b; the sums are 1, 0, 4, 3.
    merged = dirmerge.merge_deltas([a, b], "ties", density=0.5).dense()
    assert torch.allclose(merged, torch.tensor([[4.0, 0.0, 4.0, 3.0]]))
    # With b weighted the first entry's sign turns.
    weighted = dirmerge.merge_deltas([a, b], "ties", density=0.5, weights=[1, 2]).dense()
    assert torch.allclose(weighted, torch.tensor([[-3.0, 0.0, 4.0, 3.0]]))
    everything = dirmerge.merge_deltas([a, b], "ties", density=1.0).dense()
    assert torch.allclose(everything, torch.tensor([[4.0, -1.5, 2.25, 1.55]]))


@pytest.mark.parametrize(
    ("a", "b", "ridge", "smoothing"),
    [
        (0.0, 0.0, 0.0, None),
        (2.0, 1.5, 0.03, None),
        (2.0, 1.5, 0.03, "average"),
        (1.5, 1.0, 0.1, "linear"),
        (1.0, 1.0, 0.0, None),
        (2.0, 2.0, 0.0, None),
    ],
)
def test_whitened_by_its_formula(a, b, ridge, smoothing, generator):
    deltas, r = dense(generator), 20 // 3
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]

    def side(bases, exponent):
        p, s, qh = torch.linalg.svd(bases, full_matrices=False)
        return (p * (s * (s * s + ridge) ** (-exponent / 2))) @ qh

    u = side(torch.cat([u[:, :r] for u, _, _ in parts], 1), a)
    v = side(torch.cat([vh[:r].mT for _, _, vh in parts], 1), b)
    weights = [1.0, 0.5, 2.0]
    spectra = [balanced(s[:r], smoothing or "none", 3.0) for _, s, _ in parts]
    s = torch.cat([w * x for w, x in zip(weights, spectra, strict=True)])
    options = {"left_exponent": a, "right_exponent": b, "ridge": ridge, "smoothing": smoothing}
    options |= {"rho": 3.0} if smoothing == "linear" else {}
    merged = dirmerge.merge_deltas(deltas, "whitened", weights=weights, **options)
    assert torch.allclose(merged.dense(), (u * s) @ v.mT, atol=1e-9)
    if (a, b, ridge) == (1, 1, 0):
        assert torch.equal(merged.dense(), dirmerge.merge_deltas(deltas, "tsv_m", weights=weights).dense())
    if (a, b, ridge) == (2, 2, 0):  # the dual basis reproduces every task's own core
        for w, (left, own, right) in zip(weights, parts, strict=True):
            core = left[:, :r].mT @ merged.dense() @ right[:r].mT
            assert torch.allclose(core, torch.diag(w * own[:r]), atol=1e-8)


def test_whitened_balances_adapters_alone_and_is_tsv_m_without(generator):
    loras = adapters(generator)
    plain: dict[str, Any] = {"left_exponent": 1.0, "right_exponent": 1.0, "ridge": 0.0}
    assert dirmerge.merge_deltas(loras, "whitened").record.options["smoothing"] == "average"
    assert dirmerge.merge_deltas(dense(generator), "whitened").record.options["smoothing"] == "none"
    same = dirmerge.merge_deltas(loras, "whitened", smoothing="none", **plain)
    assert torch.equal(same.dense(), dirmerge.merge_deltas(loras, "tsv_m").dense())


def test_whitened_leaves_half_the_space_to_balanced_adapters(generator):
    loras = [
        LowRank(
            torch.randn(24, 5, generator=generator).double(),
            None,
            torch.randn(20, 5, generator=generator).double(),
        )
        for _ in range(4)
    ]
    got = dirmerge.merge_deltas(loras, "whitened")
    assert got.record.ranks == [2, 2, 2, 2]  # ⌊20 / (2 · 4)⌋
    assert torch.equal(got.dense(), dirmerge.merge_deltas(loras, "whitened", rank=2).dense())
    for options in ({"smoothing": "none"}, {"rank": 5}):
        assert dirmerge.merge_deltas(loras, "whitened", **options).record.ranks == [5, 5, 5, 5]
    full = [delta.dense() for delta in loras]
    assert dirmerge.merge_deltas(full, "whitened", smoothing="average").record.ranks == [5, 5, 5, 5]


def test_whitened_of_a_task_with_itself_stays_in_its_span(generator):
    delta = dense(generator, count=1)[0]
    merged = dirmerge.merge_deltas([delta, delta], "whitened", rank=4, ridge=0.0, left_exponent=1.5)
    u, _, vh = torch.linalg.svd(delta)
    value = merged.dense()
    assert torch.allclose(u[:, :4] @ (u[:, :4].mT @ value), value, atol=1e-9)
    assert torch.allclose((value @ vh[:4].mT) @ vh[:4], value, atol=1e-9)
    assert float(value.norm()) < 10 * float(delta.norm())


def test_tsv_m_by_its_formula(generator):
    deltas, r = dense(generator), 20 // 3
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    u = polar(torch.cat([u[:, :r] for u, _, _ in parts], 1))
    v = polar(torch.cat([vh[:r].mT for _, _, vh in parts], 1))
    weights = [1.0, 0.5, 2.0]
    s = torch.cat([w * s[:r] for w, (_, s, _) in zip(weights, parts, strict=True)])
    assert torch.allclose(
        dirmerge.merge_deltas(deltas, "tsv_m", weights=weights).dense(), (u * s) @ v.mT, atol=1e-10
    )


@pytest.mark.parametrize("frame", ["shared", "canonical", "random"])
def test_mda_is_the_gram_operator_of_a_simplex_etf(frame, generator):
    deltas, m, r = dense(generator, 24, 40), 24, 8
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    # Singular vectors are turned until their largest left entry is positive.
    signs = torch.cat(
        [u[:, :r].gather(0, u[:, :r].abs().argmax(0, keepdim=True))[0].sign() for u, _, _ in parts]
    )
    q = polar(torch.cat([u[:, :r] for u, _, _ in parts], 1)) * signs
    right = polar(torch.cat([vh[:r].mT for _, _, vh in parts], 1))
    shared = (q * signs * torch.cat([s[:r] for _, s, _ in parts])) @ right.mT
    merged = dirmerge.merge_deltas(deltas, "mda", frame=frame, seed=7).dense()
    if frame == "random":
        # For any Haar frame, G = M Mᵀ has eigenvalue K/(K−1) on K − 1 directions (here K = m), 0 on one.
        gram = merged @ torch.linalg.pinv(shared)
        values = torch.linalg.eigvalsh((gram + gram.mT) / 2)
        assert torch.allclose(gram, gram.mT, atol=1e-8)
        assert torch.allclose(values[1:], torch.full((m - 1,), m / (m - 1), dtype=torch.float64), atol=1e-8)
        assert abs(float(values[0])) < 1e-8
        assert not torch.allclose(merged, dirmerge.merge_deltas(deltas, "mda", frame=frame, seed=8).dense())
        return
    basis = q if frame == "shared" else torch.eye(m, dtype=torch.float64)
    k = basis.shape[1]
    etf = math.sqrt(k / (k - 1)) * basis @ (torch.eye(k, dtype=torch.float64) - 1 / k)
    assert torch.allclose(merged, etf @ etf.mT @ shared, atol=1e-10)


def test_mda_ranks(generator):
    deltas = dense(generator, 24, 40)
    assert dirmerge.merge_deltas(deltas, "mda").record.ranks == [8, 8, 8]
    assert dirmerge.merge_deltas(deltas, "mda", fraction=0.1).record.ranks == [2, 2, 2]
    assert dirmerge.merge_deltas(deltas, "mda", fraction=0.9).record.ranks == [
        8,
        8,
        8,
    ]  # ⌊m/T⌋: the frame is full
    assert dirmerge.merge_deltas(deltas, "mda", rank=3).record.ranks == [3, 3, 3]
    assert dirmerge.merge_deltas(adapters(generator, ranks=(2, 4)), "mda").record.ranks == [2, 4]
    with pytest.raises(ValueError, match="give one of them"):
        dirmerge.merge_deltas(deltas, "mda", rank=3, fraction=0.1)


def test_iso_c_has_a_flat_spectrum_with_the_mean_of_the_sum(generator):
    deltas = dense(generator)
    total = sum(deltas)
    s = torch.linalg.svdvals(total)
    merged = dirmerge.merge_deltas(deltas, "iso_c")
    assert torch.allclose(merged.dense(), s.mean() * polar(total), atol=1e-10)
    loras = adapters(generator)
    s = torch.linalg.svdvals(sum(x.dense() for x in loras))
    flat = torch.linalg.svdvals(dirmerge.merge_deltas(loras, "iso_c").dense())
    assert torch.allclose(flat[:9], s[:9].mean().expand(9), rtol=1e-9)
    assert float(flat[9]) < 1e-9


def test_wudi_exact_is_the_minimiser_and_adam_descends(generator):
    deltas = dense(generator, 8, 12, 2)

    def loss(x, weights=(1.0, 1.0)):
        return sum(
            w * float(((x - d) @ d.mT).norm() ** 2 / d.norm() ** 2)
            for d, w in zip(deltas, weights, strict=True)
        )

    exact = dirmerge.merge_deltas(deltas, "wudi", solver="exact", cutoff=1e-10).dense()
    for _ in range(20):
        step = 1e-3 * torch.randn(8, 12, generator=generator, dtype=torch.float64)
        assert loss(exact + step) >= loss(exact) - 1e-12
    start = loss(sum(deltas))
    adam = dirmerge.merge_deltas(deltas, "wudi", lr=1e-3).dense()
    assert loss(exact) <= loss(adam) < start
    weights = [3.0, 0.5]
    weighted = dirmerge.merge_deltas(deltas, "wudi", solver="exact", cutoff=1e-10, weights=weights).dense()
    assert loss(weighted, weights) < loss(exact, weights)


def test_wudi_adam_equals_autograd(generator):
    deltas = dense(generator, 7, 5, 3)
    x = sum(deltas).clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        sum((((x - d) @ d.mT) ** 2).sum() / (d**2).sum() for d in deltas).backward()
        optimizer.step()
    merged = dirmerge.merge_deltas(deltas, "wudi", lr=1e-2, steps=20).dense()
    assert torch.allclose(merged, x.detach(), atol=1e-8)


def test_wudi_exact_stays_factored_for_adapters(generator):
    loras = adapters(generator)
    factored = dirmerge.merge_deltas(loras, "wudi", solver="exact")
    multiplied = dirmerge.merge_deltas([x.dense() for x in loras], "wudi", solver="exact")
    assert factored.low_rank().rank == 9
    assert torch.allclose(factored.dense(), multiplied.dense(), atol=1e-8)


@pytest.mark.parametrize("method", FACTORED)
def test_adapters_stay_factored_and_equal_their_dense_form(method, generator):
    loras = adapters(generator)
    merged = dirmerge.merge_deltas(loras, method)
    assert merged.low_rank().rank == 9
    options: dict[str, Any] = {"rank": 3} if method in SPECTRAL else {}
    options |= {"smoothing": "average"} if method in ("dc_merge", "whitened") else {}
    reference = dirmerge.merge_deltas([x.dense() for x in loras], method, **options).dense()
    assert torch.allclose(merged.dense(), reference, atol=1e-9)


@pytest.mark.parametrize("method", FACTORED)
def test_no_dense_product_is_formed_for_adapters(method, generator, monkeypatch):
    def forbidden(self):
        raise AssertionError("an adapter was multiplied out")

    loras = adapters(generator, ranks=(2, 5, 3))
    monkeypatch.setattr(LowRank, "dense", forbidden)
    assert dirmerge.merge_deltas(loras, method).low_rank().rank == 10


@pytest.mark.parametrize("method", FACTORED)
def test_an_empty_adapter_changes_nothing(method, generator):
    loras = adapters(generator)
    nothing = LowRank(torch.zeros(40, 3, dtype=torch.float64), None, loras[0].right)
    options: dict[str, Any] = {"common_fraction": 0.5} if method == "iso_cts" else {}
    with_it = dirmerge.merge_deltas([*loras, nothing], method, **options)
    if method in ("average", "iso_cts", "iso_c"):
        # Means over tasks or over the budget count it: what must not change is the span.
        basis = torch.linalg.qr(torch.cat([x.left for x in loras], 1)).Q
        merged = with_it.dense()
        assert torch.allclose(basis @ (basis.mT @ merged), merged, atol=1e-9)
        return
    assert torch.allclose(with_it.dense(), dirmerge.merge_deltas(loras, method).dense(), atol=1e-9)


@pytest.mark.parametrize("method", ALL)
def test_weight_zero_is_absence_and_order_does_not_matter(method, generator):
    deltas = dense(generator, count=4)
    without = dirmerge.merge_deltas(deltas[:3], method).dense()
    assert torch.allclose(
        dirmerge.merge_deltas(deltas, method, weights=[1, 1, 1, 0]).dense(), without, atol=1e-9
    )
    assert torch.allclose(dirmerge.merge_deltas(deltas[2::-1], method).dense(), without, atol=1e-7)


@pytest.mark.parametrize("method", ["tsv_m", "mda", "iso_c", "iso_cts", "task_arithmetic"])
def test_a_weight_of_a_sum_multiplies_its_delta(method, generator):
    a, b, c = dense(generator)
    weighted = dirmerge.merge_deltas([a, b, c], method, weights=[2, 1, 0.5]).dense()
    assert torch.allclose(weighted, dirmerge.merge_deltas([2 * a, b, c / 2], method).dense(), atol=1e-9)


@pytest.mark.parametrize(
    ("method", "options"), [("dc_merge", {"keep": 0.5}), ("ties", {"density": 0.8}), ("average", {})]
)
def test_only_the_ratio_of_weights_of_a_mean_matters(method, options, generator):
    deltas = dense(generator)
    one = dirmerge.merge_deltas(deltas, method, weights=[2, 1, 3], **options).dense()
    twice = dirmerge.merge_deltas(deltas, method, weights=[4, 2, 6], **options).dense()
    assert torch.allclose(one, twice, atol=1e-12)
    assert not torch.allclose(one, dirmerge.merge_deltas(deltas, method, **options).dense(), atol=1e-3)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (1, 9), (9, 1), (5, 5)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_shape_and_number_of_tasks_is_defined(method, shape, count, generator):
    # 7 tasks of rank 1 or 5: more than the dimension has room for.
    deltas = dense(generator, shape[0], shape[1], count)
    merged = dirmerge.merge_deltas(deltas, method).dense()
    assert merged.shape == shape
    assert bool(torch.isfinite(merged).all())
    assert float(merged.norm()) > 0 or method == "mda"  # one vertex direction less may be all there is


@pytest.mark.parametrize("method", ALL)
def test_zero_deltas_and_equal_tasks(method, generator):
    zero = torch.zeros(12, 9, dtype=torch.float64)
    assert float(dirmerge.merge_deltas([zero, zero], method).dense().norm()) == 0
    d = torch.randn(12, 9, generator=generator, dtype=torch.float64)
    merged = dirmerge.merge_deltas([d, zero], method).dense()
    assert bool(torch.isfinite(merged).all())
    same = dirmerge.merge_deltas([d, d], method).dense()
    if method in ("ties", "wudi"):
        return  # elementwise steps leave the span
    leak = same - torch.linalg.svd(d).U[:, :9] @ (torch.linalg.svd(d).U[:, :9].mT @ same)
    assert float(leak.norm()) < 1e-9  # nothing outside the column space of the only direction there is
    assert dirmerge.merge_deltas([LowRank(zero[:, :2], None, zero[:9, :2])] * 2, method).dense().norm() == 0


def test_equal_tasks_add_no_noise_directions(generator):
    """A completed polar factor would put arbitrary directions in; the partial one keeps rank r of 2 r."""
    lora = adapters(generator, ranks=(3,))[0]
    merged = dirmerge.merge_deltas([lora, lora], "tsv_m").dense()
    column_space = torch.linalg.qr(lora.left).Q
    assert torch.allclose(column_space @ (column_space.mT @ merged), merged, atol=1e-9)
    assert torch.linalg.matrix_rank(merged).item() == 3


@pytest.mark.parametrize(
    "method", [name for name in ALL if name not in ("ties", "mda")]
)  # these see coordinates
def test_rotation_equivariance(method, generator):
    deltas = dense(generator, 15, 12, 3)
    q = torch.linalg.qr(torch.randn(15, 15, generator=generator, dtype=torch.float64)).Q
    options: dict[str, Any] = {"solver": "exact"} if method == "wudi" else {}
    turned = dirmerge.merge_deltas([q @ d for d in deltas], method, **options).dense()
    assert torch.allclose(turned, q @ dirmerge.merge_deltas(deltas, method, **options).dense(), atol=1e-7)


@pytest.mark.parametrize("method", ALL)
def test_float32_follows_float64_and_inputs_survive(method, generator):
    deltas = [d.float() for d in dense(generator)]
    copies = [d.clone() for d in deltas]
    single = dirmerge.merge_deltas(deltas, method).dense()
    double = dirmerge.merge_deltas([d.double() for d in deltas], method).dense()
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    tolerance = 5e-4 if method == "iso_cts" else 2e-5
    assert float((single.double() - double).norm() / double.norm()) < tolerance
    assert all(torch.equal(a, b) for a, b in zip(deltas, copies, strict=True))
    half = dirmerge.merge_deltas([d.bfloat16() for d in deltas], method).dense()
    assert half.dtype == torch.float32
    views = dirmerge.merge_deltas([d.mT.contiguous().mT for d in deltas], method).dense()
    assert float((views - single).norm() / single.norm()) < tolerance


def test_mda_with_one_vertex_per_task_centres_the_blocks(generator):
    deltas, r, count = dense(generator), 5, 3
    merged = dirmerge.merge_deltas(deltas, "mda", frame="blocks", rank=r).dense()
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    us, vs = [], []
    for u, _, vh in parts:
        turn = u[:, :r].gather(0, u[:, :r].abs().argmax(0, keepdim=True)).sign()
        us.append(u[:, :r] * turn)
        vs.append(vh[:r].mT * turn)
    q, v = polar(torch.cat(us, 1)), polar(torch.cat(vs, 1))
    # M = F ⊗ I_r for the simplex ETF F of T vertices: G = Q (T/(T−1) (I − 11ᵀ/T) ⊗ I) Qᵀ.
    etf = (torch.eye(count, dtype=torch.float64) - 1 / count) * count / (count - 1)
    operator = torch.kron(etf, torch.eye(r, dtype=torch.float64))
    s = torch.cat([s[:r] for _, s, _ in parts])
    assert torch.allclose(merged, q @ operator @ torch.diag(s) @ v.mT, atol=1e-10)
    unequal = adapters(generator, ranks=(3, 2, 3))
    with pytest.raises(ValueError, match="needs equal ranks"):
        dirmerge.merge_deltas(unequal, "mda", frame="blocks")
    single = dirmerge.merge_deltas(deltas[:1], "mda", frame="blocks", rank=r).dense()
    assert torch.allclose(single, (parts[0][0][:, :r] * parts[0][1][:r]) @ parts[0][2][:r], atol=1e-10)


def test_a_frame_that_stays_a_product_gives_the_same_update(generator, monkeypatch):
    """Nearly orthogonal bases: U (G^(−1/2) M G^(−1/2)) Vᵀ equals the form with its frames multiplied out."""
    from dirmerge.methods import spectral as common

    loras = [lora.to(torch.float32) for lora in adapters(generator, 400, 300)]
    for method in ("dc_merge", "tsv_m", "mda", "iso_cts"):
        product = dirmerge.merge_deltas(loras, method).dense().double()
        with monkeypatch.context() as patch:
            patch.setattr(common, "FACTORED_FRAME", 2.0)
            formed = dirmerge.merge_deltas(loras, method).dense().double()
        truth = dirmerge.merge_deltas([lora.to(torch.float64) for lora in loras], method).dense()
        tolerance = 5e-4 if method == "iso_cts" else 5e-6
        assert float((product - truth).norm() / truth.norm()) < tolerance
        assert float((formed - truth).norm() / truth.norm()) < tolerance
        assert not torch.equal(product, formed)


def test_mixed_inputs(generator):
    a = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    loras = adapters(generator, ranks=(2, 5))
    for method in ALL:
        merged = dirmerge.merge_deltas([a, *loras], method)
        assert bool(torch.isfinite(merged.dense()).all())
    assert dirmerge.merge_deltas([a, *loras], "tsv_m").record.ranks == [10, 2, 5]
    total = dirmerge.merge_deltas([a, *loras], "task_arithmetic").dense()
    assert torch.allclose(total, a + loras[0].dense() + loras[1].dense())


@settings(max_examples=50, deadline=None)
@given(
    s=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda x: sorted(x, reverse=True)),
    rho=st.floats(1, 20),
    smoothing=st.sampled_from(["none", "average", "linear"]),
)
def test_balancing_keeps_the_sum_and_limits_the_ratio(s, rho, smoothing):
    values = torch.tensor(s, dtype=torch.float64)
    out = balanced(values, smoothing, rho)
    assert float(out.sum()) == pytest.approx(float(values.sum()))
    assert bool((out[:-1] >= out[1:] - 1e-9 * values[0]).all())
    if smoothing == "average":
        assert torch.allclose(out, out[0].expand_as(out))
    if smoothing == "linear" and len(s) > 1:
        assert float(out[0] / out[-1]) == pytest.approx(min(rho, s[0] / s[-1]))


def test_dc_merge_filter_and_blocks(generator):
    deltas = dense(generator)
    merged = dirmerge.merge_deltas(deltas, "dc_merge", keep=1.0)
    core, ranks = merged.low_rank().core, merged.record.ranks
    mask = torch.block_diag(*[torch.ones(r, r) for r in ranks]).bool()
    assert not bool(core[~mask].any())
    few = dirmerge.merge_deltas(deltas, "dc_merge", keep=1e-3).low_rank().core
    assert 1 <= int((few != 0).sum()) <= 3  # one entry per task: ⌊0.001 · 400⌋ = 0, at least 1
    assert int((core != 0).sum()) == int(mask.sum())


def test_dc_merge_says_when_its_filter_keeps_next_to_nothing(generator):
    loras = adapters(generator, 200, 150, ranks=(16, 16, 16))
    record = dirmerge.merge_deltas(loras, "dc_merge").record
    assert any(
        "keeps 2 entries per task, fewer than the rank 16: set keep_per_rank" in note for note in record.notes
    )
    assert not dirmerge.merge_deltas(loras, "dc_merge", keep=0.01).record.notes
    assert not dirmerge.merge_deltas(loras, "dc_merge", keep_per_rank=3).record.notes


def test_dc_merge_keeps_a_multiple_of_each_task_s_rank(generator):
    loras = adapters(generator, ranks=(3, 5, 4))
    equal = adapters(generator, ranks=(4, 4, 4))
    got = dirmerge.merge_deltas(equal, "dc_merge", keep_per_rank=2.5)
    wanted = dirmerge.merge_deltas(equal, "dc_merge", keep=10 / 144)
    assert torch.equal(got.dense(), wanted.dense())
    assert got.record.options["keep_per_rank"] == 2.5
    assert "keep" not in got.record.options
    # Each task's own rank counts: with one entry per direction, task t has r_t entries in the whole core.
    alone = [
        int((dirmerge.merge_deltas([d], "dc_merge", keep_per_rank=1).low_rank().core != 0).sum())
        for d in loras
    ]
    assert alone == [3, 5, 4]


def test_dc_merge_without_its_block_mask(generator):
    deltas = [d.dense() for d in adapters(generator, 20, 16, ranks=(4, 4))]
    got = dirmerge.merge_deltas(deltas, "dc_merge", keep=1.0, rank=4, block_mask=False).dense()
    bases = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    left, right = (
        polar(torch.cat([part[:, :4] for part in side], 1))
        for side in zip(*[(u, vh.mT) for u, _, vh in bases], strict=True)
    )
    cores = torch.stack([left.mT @ (u[:, :4] * s[:4]) @ vh[:4] @ right for u, s, vh in bases])
    sign = cores.sum(0).sign()
    agree = cores.sign() == sign
    elected = (cores * agree).sum(0) / agree.sum(0).clamp(min=1)
    assert torch.allclose(got, left @ elected @ right.mT, atol=1e-10)
    masked = dirmerge.merge_deltas(deltas, "dc_merge", keep=1.0, rank=4).dense()
    assert not torch.allclose(got, masked, atol=1e-3)


def test_merged_delta_scale_and_alignment(generator):
    deltas = dense(generator)
    plain = dirmerge.merge_deltas(deltas, "tsv_m")
    assert plain.record.scale == 1
    tripled = dirmerge.merge_deltas(deltas, "tsv_m", scale=3.0)
    assert torch.allclose(tripled.dense(), 3 * plain.dense())
    assert tripled.record.scale == 3
    with pytest.raises(ValueError, match="give one of them"):
        dirmerge.merge_deltas(deltas, "tsv_m", scale=1.0, alignment=0.5)


def test_lazy_tasks_hold_one_delta_at_a_time(generator):
    """dc_merge and tsv_m may not keep the T deltas: that is what bounds the memory of a merge."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    source = dense(generator, 64, 64, 6)

    def loader(t):
        def load():
            nonlocal most
            delta = source[t].clone()
            alive.append(weakref.ref(delta))
            most = max(most, sum(ref() is not None for ref in alive))
            return delta

        return load

    for method in ("dc_merge", "tsv_m", "mda", "iso_c", "wudi", "task_arithmetic", "average", "iso_cts"):
        alive.clear()
        most = 0
        tasks = Tasks((64, 64), [loader(t) for t in range(6)], [None] * 6)
        lazy = merge_tasks(tasks, method, [1.0] * 6, {})
        assert most <= 2, method
        assert torch.allclose(lazy.dense(), dirmerge.merge_deltas(source, method).dense())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dc_merg", {}, "did you mean 'dc_merge'"),
        ("dc_merge", {"smothing": "none"}, "did you mean 'smoothing'"),
        ("dc_merge", {"smoothing": "some"}, "smoothing"),
        ("dc_merge", {"keep": 0.0}, "keep"),
        ("dc_merge", {"keep": 1.5}, "keep"),
        ("dc_merge", {"keep": 0.1, "keep_per_rank": 3.0}, "give one of them"),
        ("dc_merge", {"keep_per_rank": 0.0}, "keep_per_rank"),
        ("dc_merge", {"rho": 3.0}, "rho belongs to smoothing='linear'"),
        ("dc_merge", {"smoothing": "linear", "rho": 0.5}, "rho"),
        ("dc_merge", {"rank": 0}, "rank"),
        ("dc_merge", {"svd": "quick"}, "svd"),
        ("dc_merge", {"svd_tolerance": 0.0}, "svd_tolerance"),
        ("whitened", {"rho": 3.0}, "rho belongs to smoothing='linear'"),
        ("mda", {"frame": "own"}, "frame"),
        ("mda", {"fraction": 0.0}, "fraction"),
        ("iso_cts", {"common_fraction": 1.1}, "common_fraction"),
        ("wudi", {"steps": 0}, "steps"),
        ("wudi", {"solver": "exact", "lr": 1e-3}, "belong to solver='adam'"),
        ("wudi", {"cutoff": 1e-3}, "belongs to solver='exact'"),
        ("ties", {"density": 0.0}, "density"),
        ("ties", {"density": math.nan}, "density"),
        ("average", {"density": 0.5}, "no option 'density'"),
    ],
)
def test_options_are_checked_by_name_and_range(method, options, message, generator):
    with pytest.raises(ValueError, match=message):
        dirmerge.merge_deltas(dense(generator), method, **options)


def test_inputs_are_checked(generator):
    a, b, c = dense(generator)
    with pytest.raises(ValueError, match="at least one delta"):
        dirmerge.merge_deltas([], "average")
    with pytest.raises(TypeError, match=r"deltas\[1\] must be"):
        dirmerge.merge_deltas([a, [1.0]], "average")  # type: ignore[list-item]
    with pytest.raises(TypeError, match="list"):
        dirmerge.merge_deltas(a, "average")
    with pytest.raises(ValueError, match=r"deltas\[0\] has \(24, 20\), deltas\[1\] \(20, 24\)"):
        dirmerge.merge_deltas([a, b.mT], "average")
    with pytest.raises(ValueError, match=r"deltas\[1\] must be finite"):
        dirmerge.merge_deltas([a, b * math.inf, c], "tsv_m")
    with pytest.raises(ValueError, match="floating point"):
        dirmerge.merge_deltas([a.long()], "average")
    with pytest.raises(ValueError, match="merges matrices"):
        dirmerge.merge_deltas([a[0], b[0]], "tsv_m")
    with pytest.raises(ValueError, match="one entry per delta"):
        dirmerge.merge_deltas([a, b], "tsv_m", weights=[1.0])
    with pytest.raises(ValueError, match="must not be negative"):
        dirmerge.merge_deltas([a, b], "tsv_m", weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="must be finite"):
        dirmerge.merge_deltas([a, b], "average", weights=[1.0, math.nan])
    with pytest.raises(ValueError, match="must not all be 0"):
        dirmerge.merge_deltas([a, b], "average", weights=[0.0, 0.0])
    with pytest.raises(ValueError, match="must not sum to 0"):
        dirmerge.merge_deltas([a, b], "average", weights=[1.0, -1.0])


def test_other_packages_extend_the_registry(generator, monkeypatch):
    @register("half of the first task", scale=Scale(value=1.0), elementwise=True)
    def first_half(tasks, weights, *, share: float = 0.5, seed: int = 0):
        from dirmerge.methods import MergedDelta, MergeRecord

        return MergedDelta(tasks.dense(0) * share, MergeRecord("first_half", {"share": share}, tasks.shape))

    try:
        a, b, _ = dense(generator)
        assert torch.equal(dirmerge.merge_deltas([a, b], "first_half").dense(), a * 0.5)
        assert torch.equal(dirmerge.merge_deltas([a, b], "first_half", share=0.25).dense(), a * 0.25)
        with pytest.raises(ValueError, match="registered already"):
            register("again", scale=Scale(value=1.0))(first_half)
    finally:
        del METHODS["first_half"]


def test_entry_points_are_loaded_for_unknown_names(monkeypatch):
    from dirmerge.methods import registry

    loaded = []

    class Entry:
        def load(self):
            loaded.append(True)

    registry._load_entry_points.cache_clear()
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Entry()] if group == "dirmerge.methods" else []
    )
    with pytest.raises(ValueError, match="unknown method 'elsewhere'"):
        get_method("elsewhere")
    assert loaded == [True]
    registry._load_entry_points.cache_clear()
