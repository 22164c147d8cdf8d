"""Linear algebra against float64, by invariants and by properties of the inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dirmerge import linalg
from dirmerge.linalg import cost, minimax
from dirmerge.linalg.orthogonal import GRAM_SPLIT, orthogonality
from dirmerge.linalg.svd import _basis as basis_of
from dirmerge.ops.delta_sketch import random_signs


def spectrum(name: str, p: int) -> Tensor:
    """Singular values by property."""
    return {
        "flat": torch.ones(p, dtype=torch.float64),
        "decay": torch.logspace(0, -6, p, dtype=torch.float64),
        "deficient": torch.cat([torch.linspace(2, 1, p - p // 3), torch.zeros(p // 3)]).double(),
        "repeated": torch.tensor([3.0] * (p // 2) + [1.0] * (p - p // 2), dtype=torch.float64),
        "huge": 1e15 * torch.linspace(2, 1, p, dtype=torch.float64),
        "tiny": 1e-15 * torch.linspace(2, 1, p, dtype=torch.float64),
    }[name]


def matrix(m: int, n: int, s: Tensor, generator: torch.Generator) -> Tensor:
    p = min(m, n)
    u = torch.linalg.qr(torch.randn(m, p, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, p, generator=generator, dtype=torch.float64)).Q
    return (u * s) @ v.mT


SHAPES = [(33, 33), (70, 33), (33, 70), (199, 12), (1, 9), (9, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["flat", "decay", "deficient", "repeated", "huge", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_svd_is_optimal_and_orthonormal(shape, kind, dtype, generator):
    p = min(shape)
    truth = matrix(shape[0], shape[1], spectrum(kind, p), generator)
    rank = max(1, p // 3)
    svd = linalg.svd_truncated(truth.to(dtype), rank, "exact")
    eps, top = torch.finfo(dtype).eps, float(torch.linalg.matrix_norm(truth, 2))
    best = torch.linalg.svdvals(truth)
    eye = torch.eye(rank, dtype=torch.float64)
    assert float((svd.u.double().mT @ svd.u.double() - eye).norm()) < 60 * eps * rank
    assert float((svd.v.double().mT @ svd.v.double() - eye).norm()) < 60 * eps * rank
    error = float((truth - svd.dense().double()).norm())
    assert error <= float(best[rank:].square().sum().sqrt()) + 60 * eps * top * math.sqrt(p)
    assert float(svd.energy) == pytest.approx(
        float(best[:rank].square().sum() / best.square().sum()), abs=1e-5
    )
    assert float(svd.residual) == pytest.approx(error, abs=2e-3 * top * math.sqrt(p))


def test_randomized_svd_meets_its_certificate(generator):
    n, rank = 256, 32
    # The spectrum of fine-tuning deltas: a heavy-tailed head on a flat bulk.
    s = 1 / torch.arange(1, n + 1, dtype=torch.float64).sqrt() + 0.05
    batch = torch.stack([matrix(n, 200, s[:200], generator) for _ in range(3)]).float()
    best = s[:rank].square().sum() / s[:200].square().sum()
    for given_iterations in (0, 1, 3, None):
        svd = linalg.svd_truncated(batch, rank, "randomized", seed=5, power_iterations=given_iterations)
        assert svd.method == "randomized"
        measured = torch.tensor(
            [float((b @ v).double().square().sum()) for b, v in zip(batch, svd.v, strict=True)]
        )
        captured = svd.energy * svd.total
        assert torch.all(measured + 1e-3 * captured >= captured)  # ‖a v‖² is at least ‖uᵀ a v‖²
        residual = (batch.double() - svd.dense().double()).square().sum((1, 2)).sqrt()
        assert torch.allclose(svd.residual, residual, rtol=2e-3)
        if given_iterations is None:
            assert torch.all(svd.gain <= 1e-2)
            assert torch.all(svd.energy >= 0.99 * best)
        else:
            assert svd.power_iterations == given_iterations
    rough = linalg.svd_truncated(batch, rank, "randomized", power_iterations=0)
    fine = linalg.svd_truncated(batch, rank, "randomized", power_iterations=4)
    assert torch.all(fine.energy > rough.energy)


def test_svd_is_deterministic_and_leaves_its_input_alone(generator):
    a = torch.randn(80, 70, generator=generator)
    before = a.clone()
    first = linalg.svd_truncated(a, 8, "randomized", seed=3)
    second = linalg.svd_truncated(a, 8, "randomized", seed=3)
    other = linalg.svd_truncated(a, 8, "randomized", seed=4)
    assert torch.equal(first.u, second.u)
    assert not torch.equal(first.u, other.u)
    assert torch.equal(a, before)
    strided = linalg.svd_truncated(a.mT, 8, "exact")
    assert torch.allclose(strided.s, linalg.svd_truncated(a, 8, "exact").s, rtol=1e-5)


def test_svd_of_zero_and_auto_choice(generator):
    zero = linalg.svd_truncated(torch.zeros(6, 4), 2)
    assert float(zero.energy) == 1
    assert float(zero.residual) == 0
    small, large = torch.randn(40, 40, generator=generator), torch.randn(560, 560, generator=generator)
    assert linalg.svd_truncated(small, 4).method == "exact"
    assert linalg.svd_truncated(large, 70).method == "randomized"
    assert linalg.svd_truncated(large, 500).method == "exact"


@pytest.mark.parametrize("is_single", [True, False])
@pytest.mark.parametrize("shape", [(600, 600), (2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096)])
def test_auto_takes_the_randomized_form_up_to_some_rank(shape, is_single):
    (m, n), p = shape, min(shape)
    forms = [cost.cheapest_form(m, n, rank, is_single=is_single) for rank in range(1, p + 1, 7)]
    assert forms == sorted(forms, key=lambda form: form != "randomized")  # never back below that rank
    # A merge of T keeps p/T of each: of two models and more that is cheaper randomized, of one it is not.
    assert [cost.cheapest_form(m, n, p // tasks, is_single=is_single) for tasks in (2, 3, 4, 8)] == (
        ["randomized"] * 4
    )
    assert forms[-1] == "lapack"
    assert is_single or "gram" not in forms


def test_predicted_costs_grow_with_the_matrix_and_the_rank():
    assert cost.cheapest_form(512, 9000, 4, is_single=True) == "gram"  # too little time to approximate
    assert cost.exact_form(150, 150, 9, is_single=True) == "lapack"
    forms: tuple[cost.Form, ...] = ("randomized", "gram", "lapack")
    for form in forms[:2]:
        assert cost.form_cost(2048, 2048, 256, form) < cost.form_cost(2048, 2048, 512, form)
    for form in forms:
        costs = [
            cost.form_cost(m, n, 100, form) for m, n in ((700, 700), (900, 700), (900, 900), (2000, 900))
        ]
        assert costs == sorted(costs)
        assert cost.form_cost(3000, 700, 100, form) == cost.form_cost(700, 3000, 100, form)
        # Between a tenth and ten times the work of the textbook: the units are FLOPs.
        assert 0.1 < cost.form_cost(4096, 4096, 4096, form) / (20 * 4096**3) < 10
    for method in ("auto", "exact", "randomized"):
        assert linalg.svd_flops(0, 0, 0, method) == 0
    assert linalg.svd_flops(2048, 2048, 256, "auto") == cost.randomized_cost(2048, 2048, 256)
    assert linalg.svd_flops(2048, 2048, 256, "exact") == cost.gram_cost(2048, 2048, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_basis_of_nearly_dependent_columns_is_nearly_orthonormal(dtype, generator):
    steps = []
    for angle in (1.0, 0.2, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5, 0.0):
        y = torch.randn(300, 40, generator=generator, dtype=torch.float64)
        y[:, 1:] = y[:, :1] + angle * y[:, 1:]
        q, precision = basis_of(y.to(dtype), dtype)
        steps.append(precision)
        q = q.double()
        assert float((q.mT @ q - torch.eye(40, dtype=torch.float64)).norm()) < 1e-3
        if angle >= 1e-4:
            assert float((y - q @ torch.linalg.lstsq(q, y).solution).norm() / y.norm()) < 1e-5
    expected = [torch.float32] * 2 if dtype == torch.float32 else [torch.float64] * 2
    assert steps == [*expected, *[torch.float64] * (steps.index(None) - 2), *[None] * steps[2:].count(None)]
    assert basis_of(y.to(dtype), None)[1] is None


@pytest.mark.parametrize("kind", ["flat", "headed", "decay", "deficient", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomized_bases_are_orthonormal_and_reach_the_energy(kind, dtype, generator):
    n, rank = 220, 60
    assert not cost.iterates_by_gram(n, n, rank)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if kind == "headed":
        a = fine_tune(n, n, generator)
    elif kind == "decay":
        a = matrix(n, n, torch.logspace(0, -6, n).double(), generator)
    elif kind == "deficient":
        a = a[:, :30] @ torch.randn(30, n, generator=generator, dtype=torch.float64)
    scale = 1e-25 if kind == "tiny" else 1.0
    for iterations in (0, 1, 6):
        found = linalg.svd_truncated((a * scale).to(dtype), rank, "randomized", power_iterations=iterations)
        eye, eps = torch.eye(rank, dtype=torch.float64), torch.finfo(dtype).eps
        for basis in (found.u, found.v):
            # Measured: 0.6 to 1.2 ε r. One pass of CholeskyQR alone leaves up to 1500 ε r.
            assert float((basis.double().mT @ basis.double() - eye).norm()) < 2 * eps * rank
        captured = (a @ found.v.double()).square().sum()
        best = torch.linalg.svdvals(a)[:rank].square().sum()
        assert float(captured) >= (0.6, 0.93, 0.995)[(0, 1, 6).index(iterations)] * float(best)


@pytest.mark.parametrize("kind", ["flat", "headed", "deficient", "tiny", "double"])
def test_iterations_with_the_gram_matrix_reach_the_subspace_of_those_with_the_matrix(kind, generator):
    m, n, rank = 640, 200, 50
    assert cost.iterates_by_gram(m, n, rank)
    a = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if kind == "headed":
        a = fine_tune(m, n, generator)
    elif kind == "deficient":
        a = a[:, :30] @ torch.randn(30, n, generator=generator, dtype=torch.float64)
    elif kind == "tiny":
        a = a * 1e-15
    best = torch.linalg.svdvals(a)[:rank].square().sum()
    a = a if kind == "double" else a.float()
    eps = torch.finfo(a.dtype).eps
    for iterations in (2, 5):
        found = linalg.svd_truncated(a, rank, "randomized", power_iterations=iterations)
        assert found.power_iterations == iterations
        y = a.double() @ random_signs(n, rank + 16, 0, dtype=torch.float64, device=a.device)
        for _ in range(iterations):
            y = a.double() @ torch.linalg.qr(a.double().mT @ torch.linalg.qr(y).Q).Q
        expected = torch.linalg.svdvals(torch.linalg.qr(y).Q.mT @ a.double())[:rank]
        torch.testing.assert_close(
            found.s.double(), expected, rtol=2e3 * eps, atol=200 * eps * float(expected[0])
        )
        eye = torch.eye(rank, dtype=torch.float64)
        for basis in (found.u, found.v):
            assert float((basis.double().mT @ basis.double() - eye).norm()) < 60 * eps * rank
        captured = (a.double() @ found.v.double()).square().sum()
        assert float(captured) >= (1 - float(found.gain)) * float(best) * (1 - 1e-5)
    adaptive = linalg.svd_truncated(a, rank, "randomized")
    assert float(adaptive.gain) <= 1e-2
    assert float(adaptive.s.double().square().sum()) >= 0.99 * float(best)


class Scaled:
    """A matrix-like of the tests' own: c times a tensor, and the calls it got."""

    def __init__(self, tensor: Tensor, factor: float, calls: list[str]) -> None:
        self.tensor, self.factor, self.calls = tensor, factor, calls
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    @property
    def mT(self):  # noqa: N802
        return Scaled(self.tensor.mT, self.factor, self.calls)

    def __matmul__(self, x):
        self.calls.append("matmul")
        return self.factor * (self.tensor @ x)

    def dense(self):
        self.calls.append("dense")
        return self.factor * self.tensor

    def sketch(self, width, seed):
        self.calls.append("sketch")
        signs = random_signs(self.shape[-1], width, seed, dtype=self.dtype, device=self.device)
        return self.factor * (self.tensor @ signs), self.dense().double().square().sum((-2, -1))

    def gram(self, dtype):
        self.calls.append("gram")
        a = self.dense().to(dtype)
        return a.mT @ a, a.double().square().sum((-2, -1))


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(40, 30), (300, 210), (210, 300), (600, 210)])
def test_svd_takes_whatever_multiplies_like_a_matrix(shape, method, generator):
    a = torch.randn(shape, generator=generator)
    calls: list[str] = []
    assert isinstance(Scaled(a, 2.0, calls), linalg.MatrixLike)
    assert not isinstance(a, linalg.MatrixLike)
    rank = 9 if shape[0] < 500 else 60
    expected = linalg.svd_truncated(2 * a, rank, method, seed=4)
    found = linalg.svd_truncated(Scaled(a, 2.0, calls), rank, method, seed=4)
    torch.testing.assert_close(found.s, expected.s, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.dense(), expected.dense(), rtol=0, atol=1e-4 * float(expected.s[0]))
    # Where iterations with the Gram matrix cost less, the sketch is not taken.
    assert ("sketch" in calls) == (
        method == "randomized" and not cost.iterates_by_gram(shape[0], shape[1], rank)
    )
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        linalg.svd_truncated("a matrix", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: linalg.svd_truncated(a, 0), "rank must be at least 1"),
        (lambda a: linalg.svd_truncated(a, 2, "fast"), "method must be"),  # type: ignore[arg-type]
        (lambda a: linalg.svd_truncated(a * math.nan, 2), "must be finite"),
        (lambda a: linalg.svd_truncated(a[0], 2), "must have shape"),
        (lambda a: linalg.svd_truncated(a.long(), 2), "floating-point"),
        (lambda a: linalg.svd_truncated(a, 2, tolerance=2.0), "tolerance"),
        (lambda a: linalg.svd_truncated(a, 2, "randomized", power_iterations=-1), "power_iterations"),
        (lambda a: linalg.polar(a / 0), "must be finite"),
        (lambda a: linalg.polar(a, "svd"), "method must be"),  # type: ignore[arg-type]
        (lambda a: linalg.polar(a, max_steps=0), "max_steps"),
        (lambda a: linalg.procrustes(a, a[:2]), "same shape"),
        (lambda a: linalg.simplex_etf(1, 3), "at least 2"),
        (lambda a: linalg.simplex_etf(5, 3), "no simplex ETF"),
        (lambda a: linalg.simplex_etf(3, 4, frame=torch.ones(4, 3)), "orthonormal"),
        (lambda a: linalg.simplex_etf(3, 4, frame=torch.eye(4)[:, :3], seed=1), "seed"),
        (lambda a: linalg.etf_gap(a[:, :1]), "k >= 2"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(33, 33), (70, 33), (33, 70), (199, 12), (1, 9), (9, 1)])
@pytest.mark.parametrize("method", ["exact", "newton_schulz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_factor_is_the_nearest_orthogonal_matrix(shape, method, dtype, generator):
    p = min(shape)
    s = torch.linspace(3, 0.2, p, dtype=torch.float64)
    truth = matrix(shape[0], shape[1], s, generator)
    u, _, vh = torch.linalg.svd(truth, full_matrices=False)
    found = linalg.polar(truth.to(dtype), method)
    limit = 2e-5 if dtype == torch.float32 else 1e-11
    assert float((found.q.double() - u @ vh).norm()) < limit * math.sqrt(p)
    assert float(found.residual) < limit
    assert int(found.rank) == p
    assert found.fallback is None
    assert found.method == ("newton_schulz" if method == "newton_schulz" else found.method)


def test_polar_is_equivariant_and_idempotent(generator):
    a = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    polar_a = linalg.polar(a).q
    assert torch.allclose(linalg.polar(q @ a).q, q @ polar_a, atol=1e-12)
    assert torch.allclose(linalg.polar(polar_a).q, polar_a, atol=1e-12)
    assert torch.allclose(linalg.polar(a * 1e-20).q, polar_a, atol=1e-12)


def test_gram_form_agrees_with_the_svd_up_to_its_condition_limit(generator):
    for ratio in (1e-1, 1e-3, 9e-5):
        truth = matrix(200, 30, torch.logspace(0, math.log10(ratio), 30, dtype=torch.float64), generator)
        u, _, vh = torch.linalg.svd(truth.float().double(), full_matrices=False)
        found = linalg.polar(truth.float(), "exact")
        assert found.method == "gram"
        assert float((found.q.double() - u @ vh).norm()) / math.sqrt(30) < 1e-6
    beyond = matrix(200, 30, torch.logspace(0, -6, 30, dtype=torch.float64), generator)
    assert linalg.polar(beyond.float(), "exact").method == "svd"


def test_newton_schulz_never_returns_a_non_orthogonal_factor(generator):
    s = torch.cat([torch.ones(20), torch.full((4,), 1e-9)]).double()
    found = linalg.polar(matrix(40, 24, s, generator), "newton_schulz")
    assert found.fallback is not None
    assert "Newton–Schulz reached" in found.fallback
    assert found.method == "svd"
    assert float(found.residual) < 1e-12


def test_polar_of_a_rank_deficient_matrix(generator):
    truth = matrix(50, 20, torch.cat([torch.ones(15), torch.zeros(5)]).double(), generator)
    full = linalg.polar(truth)
    assert int(full.rank) == 15
    assert float(full.residual) < 1e-12
    partial = linalg.polar(truth, complete=False)
    gram = partial.q.mT @ partial.q
    assert torch.allclose(gram @ gram, gram, atol=1e-12)  # a projector: q is a partial isometry
    assert float(gram.trace()) == pytest.approx(15, abs=1e-9)
    assert torch.allclose(partial.q, truth, atol=1e-12)  # all its singular values are 1 or 0 already


def test_polar_of_a_batch_and_of_nothing(generator):
    batch = torch.randn(3, 2, 10, 4, generator=generator, dtype=torch.float64)
    q = linalg.polar(batch, "newton_schulz").q
    for i in range(3):
        for j in range(2):
            assert torch.allclose(q[i, j], linalg.polar(batch[i, j], "exact").q, atol=1e-10)
    assert linalg.polar(torch.zeros(0, 5, 3)).q.shape == (0, 5, 3)
    assert linalg.polar(torch.zeros(5, 0)).q.shape == (5, 0)


@settings(max_examples=25, deadline=None)
@given(lower=st.floats(1e-6, 0.6))
def test_minimax_quintic_equioscillates(lower):
    a, b, c, error = minimax.quintic(lower)
    x = torch.cat([torch.linspace(lower, 1, 4001, dtype=torch.float64)])
    deviation = (1 - (a * x + b * x**3 + c * x**5)).abs()
    assert float(deviation.max()) <= error * (1 + 1e-5) + 1e-12
    # No odd quintic does better: the error is taken with alternating sign at both ends and twice between.
    ends = [1 - (a * z + b * z**3 + c * z**5) for z in (lower, 1.0)]
    assert ends[0] == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert ends[1] == pytest.approx(-error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_procrustes_finds_the_rotation(d, generator):
    a = torch.randn(50, d, generator=generator, dtype=torch.float64)
    r = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    r[:, 0] *= torch.linalg.det(r).sign()
    assert torch.allclose(linalg.procrustes(a, a @ r), r, atol=1e-10)
    mirrored = r.clone()
    mirrored[:, 0] *= -1
    special = linalg.procrustes(a, a @ mirrored)
    assert float(torch.linalg.det(special)) == pytest.approx(1)
    assert torch.allclose(linalg.procrustes(a, a @ mirrored, special=False), mirrored, atol=1e-10)
    # Optimal among rotations: no small turn does better.
    loss = float((a @ special - a @ mirrored).norm())
    for _ in range(20):
        skew = torch.randn(d, d, generator=generator, dtype=torch.float64) * 0.05
        turned = special @ torch.linalg.matrix_exp(skew - skew.mT)
        assert float((a @ turned - a @ mirrored).norm()) >= loss - 1e-9


@pytest.mark.parametrize(("k", "d"), [(2, 1), (2, 5), (4, 3), (5, 5), (7, 20)])
@pytest.mark.parametrize("seed", [None, 1])
def test_simplex_etf_has_its_gram_matrix(k, d, seed):
    vertices = linalg.simplex_etf(k, d, seed=seed, dtype=torch.float64)
    gram = vertices.mT @ vertices
    ideal = (k * torch.eye(k, dtype=torch.float64) - 1) / (k - 1)
    assert torch.allclose(gram, ideal, atol=1e-12)
    assert linalg.etf_gap(vertices) < 1e-12
    assert float(vertices.sum(1).norm()) < 1e-12


def test_simplex_etf_on_a_frame_and_gap_of_another_set(generator):
    frame = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64)).Q
    vertices = linalg.simplex_etf(4, 9, frame=frame, dtype=torch.float64)
    projector = frame @ frame.mT
    assert torch.allclose(projector @ vertices, vertices, atol=1e-12)
    assert linalg.etf_gap(torch.randn(9, 4, generator=generator)) > 0.05


def test_seeds_depend_on_name_and_seed_alone():
    assert linalg.seed_for("a") == linalg.seed_for("a")
    assert len({linalg.seed_for(n, s) for n in ("a", "b", "a.b") for s in (0, 1)}) == 6
    assert 0 <= linalg.seed_for("x") < 2**63


def test_numerical_rank_and_finiteness():
    assert linalg.numerical_rank(torch.tensor([1.0, 1e-3, 1e-9]), 100).item() == 2
    assert linalg.numerical_rank(torch.zeros(3), 100).item() == 0
    assert linalg.numerical_rank(torch.zeros(0), 100).item() == 0
    assert linalg.all_finite(torch.full((4,), 3e38))  # the sum overflows, the values do not
    assert not linalg.all_finite(torch.tensor([math.inf, -math.inf]))


def fine_tune(m, n, generator, head=20, energy=0.75):
    """A heavy-tailed head on a flat bulk, of norm 1."""
    s = torch.arange(1, head + 1, dtype=torch.float64) ** -0.7
    top = matrix(m, n, torch.cat([s, torch.zeros(min(m, n) - head)]), generator)
    bulk = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return top * (energy**0.5 / top.norm()) + bulk * ((1 - energy) ** 0.5 / bulk.norm())


@pytest.mark.parametrize("shape", [(300, 300), (520, 260), (260, 520)])
def test_gram_form_of_the_svd_is_as_accurate_as_lapack(shape, generator):
    truth = fine_tune(shape[0], shape[1], generator)
    rank = min(shape) // 8
    u, s, vh = torch.linalg.svd(truth, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    lu, ls, lvh = torch.linalg.svd(truth.float(), full_matrices=False)
    lapack = ((lu[:, :rank] * ls[:rank]) @ lvh[:rank]).double()
    found = linalg.svd_truncated(truth.float(), rank, "exact")
    error, own = (found.dense().double() - best).norm(), (lapack - best).norm()
    # Measured: 0.3 to 2.6 times LAPACK's error, which is 2e-6 to 1e-5.
    assert error <= 4 * own + 1e-6
    torch.testing.assert_close(found.s.double(), s[:rank], rtol=1e-5, atol=0)
    eye = torch.eye(rank, dtype=torch.float64)
    for basis in (found.u, found.v):
        assert (basis.double().mT @ basis.double() - eye).norm() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("last", [1e-3, 1e-5, 0.0])
def test_gram_form_of_the_svd_where_float32_loses_the_small_ones(last, scale, generator):
    n, rank = 240, 30
    s = torch.cat([torch.logspace(0, -1, 20), torch.full((10,), last), torch.zeros(n - 30)]).double()
    truth = matrix(n, n, s, generator)
    found = linalg.svd_truncated((truth * scale).float(), rank, "exact")
    torch.testing.assert_close(found.s.double() / scale, s[:rank], rtol=1e-5, atol=6e-7)
    assert (found.dense().double() / scale - truth).norm() < 2e-6 * truth.norm()
    kept = int(linalg.numerical_rank(found.s, n))
    assert kept == (30 if last else 20)


def stacked(m, k, generator, shared):
    """Orthonormal bases of eight tasks side by side, part of each near a common subspace."""
    common = torch.randn(m, k // 16, generator=generator, dtype=torch.float64)
    bases = []
    for _ in range(8):
        own = torch.randn(m, k // 8, generator=generator, dtype=torch.float64)
        if shared:
            own[:, : k // 16] = common + shared * own[:, : k // 16]
        bases.append(torch.linalg.qr(own).Q)
    return torch.cat(bases, 1)


@pytest.mark.parametrize("m", [320, 400, 900])
@pytest.mark.parametrize("shared", [0.0, 0.3, 1e-2])
def test_gram_form_of_the_polar_factor_is_as_accurate_as_the_svd(m, shared, generator):
    x = stacked(m, 320, generator, shared)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    fu, _, fvh = torch.linalg.svd(x.float(), full_matrices=False)
    found = linalg.polar(x.float(), "exact")
    assert found.method == "gram"
    assert found.fallback is None
    own = float((fu.double() @ fvh.double() - u @ vh).norm())
    assert float((found.q.double() - u @ vh).norm()) <= 2 * own + 1e-6
    assert float(found.residual) < 5e-6
    huge = linalg.polar(x.float() * 1e30, "exact")
    tiny = linalg.polar(x.float() * 1e-30, "exact")
    for other in (huge, tiny):
        assert other.method == "gram"
        assert float((other.q - found.q).norm()) <= 4 * own + 1e-5


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("m", [300, 500])
def test_gram_form_of_the_polar_factor_is_orthonormal_down_to_the_last_direction(m, complete, generator):
    small = torch.tensor([3e-2, 1e-2, 1e-3, 1e-4, 3e-5, 1.2e-5, 6e-6, 4e-6]).double()
    # Equal values where the columns are split into those that the Gram matrix resolves and the others.
    equal = torch.full((60,), 2 * GRAM_SPLIT, dtype=torch.float64)
    s = torch.cat([torch.linspace(2, 0.1, 232, dtype=torch.float64), equal, small])
    truth = matrix(m, 300, s, generator)
    found = linalg.polar(truth.float(), "exact", complete=complete)
    assert found.method == "gram"
    assert int(found.rank) in (298, 299, 300)  # ε √m s_1 is 4e-6 and 5e-6
    gram = found.q.double().mT @ found.q.double()
    values = torch.linalg.eigvalsh(gram)
    missing = 0 if complete else 300 - int(found.rank)
    assert float((values[missing:] - 1).abs().max()) < 3e-5
    assert float(values[:missing].abs().sum()) < 1e-5
    # Off the ill-determined directions the factor is right: they are off by ε over their singular value.
    u, _, vh = torch.linalg.svd(truth, full_matrices=False)
    sure = s > 1e-2
    projected = u[:, sure].mT @ found.q.double() @ vh[sure].mT
    assert float((projected - torch.eye(int(sure.sum()))).abs().max()) < 2e-5


def test_gram_form_of_the_polar_factor_of_dependent_columns(generator):
    bases = stacked(400, 160, generator, 0.0)
    x = torch.cat([bases, bases], 1).float()  # 320 columns of rank 160
    partial = linalg.polar(x, "exact", complete=False)
    assert int(partial.rank) == 160
    gram = (partial.q.mT @ partial.q).double()
    assert (gram @ gram - gram).norm() < 1e-4  # a projector: q is a partial isometry
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    assert (partial.q.double() - u[:, :160] @ vh[:160]).norm() < 1e-4
    full = linalg.polar(x, "exact")
    assert int(full.rank) == 160
    assert float(full.residual) < 1e-5
    zero = linalg.polar(torch.zeros(300, 200))
    assert int(zero.rank) == 0
    assert float(zero.residual) < 1e-6


def test_orthonormal_bases_of_dependent_columns(generator):
    from dirmerge.linalg._common import orthonormal

    for kind in ("flat", "decay", "deficient", "tiny"):
        y = matrix(120, 24, spectrum(kind, 24), generator).float()
        q, r = orthonormal(y)
        assert (q.double().mT @ q.double() - torch.eye(24, dtype=torch.float64)).norm() < 1e-5
        assert (q.double() @ r.double() - y.double()).norm() < 1e-5 * y.double().norm()
        assert torch.equal(r, r.triu())
    q, r = orthonormal(torch.zeros(5, 3))
    assert (q.mT @ q - torch.eye(3)).norm() < 1e-6
    assert torch.equal(r, torch.zeros(3, 3))


def test_orthogonality_of_a_partial_isometry_is_not_lost_in_cancellation(generator):
    # I − vvᵀ misses one direction that is spread over all columns: ‖qᵀq − I‖_F = 1. Row norms of qᵀq less
    # its diagonal, each near 1, lose that in float32: they gave an error of 2e-6 here, 2e-5 at n = 4096.
    n = 1024
    v = torch.linalg.qr(torch.randn(n, 1, generator=generator, dtype=torch.float64)).Q
    q = (torch.eye(n, dtype=torch.float64) - v @ v.mT).float()
    assert float(orthogonality(q)) == pytest.approx(n**-0.5, abs=2e-8)
