"""What the forms of the truncated SVD cost, predicted from the shape: the choice of `svd="auto"`.

All costs are FLOPs of a large float32 GEMM that take as long. The constants were fitted by hand to single
timings of the stages on two cores of an AMD EPYC with AVX-512 and MKL, where such a GEMM runs at
175 GFLOP/s; `python -m benchmarks.svd_choice rates` times the stages again. No GPU was measured: where GEMMs
have a larger share of the speed, the randomized form should gain more than predicted.
"""

from __future__ import annotations

from typing import Literal

Form = Literal["lapack", "gram", "randomized"]

# Up to this min(m, n) the exact form takes 0.05 s at most: no reason to approximate.
EXACT_UP_TO = 512
# Below this min(m, n) LAPACK's SVD is as fast as the Gram form.
GRAM_FROM = 192
# Above this rank, relative to min(m, n), the last kept direction is often too small for a float32 Gram matrix
# (as it is of a square Gaussian matrix, or beside a head), and LAPACK's SVD would be made after all. The
# randomized form gains little there.
GRAM_UP_TO = 0.6
# Directions beyond the rank that the sketch of the randomized form has.
OVERSAMPLING = 16
# Time of the decompositions of an n x n matrix over that of a GEMM of the same size: this, and this over n.
# Half of their steps are products with one vector, which small GEMMs outrun the more.
EIGH = (3.0, 9.7e3)
SVD = (10.0, 1.6e4)
# Time of CholeskyQR over that of the product of the basis with a square matrix of its width: one pass, a
# pass that refines two bases, and both passes.
ONE_PASS, REFINEMENT, TWO_PASSES = 1.8, 2.2, 2.8
# Time of the turns of the Gram form over that of their GEMMs alone.
TURNING = 1.4
# Power iterations to expect. Spectra with a head take two; a flat one takes three at half of the directions,
# where the choice is close, and up to six at an eighth, where it is not.
ITERATIONS = 3
# How many more iterations it takes with aᵀa, whose energies lag half an iteration behind.
LAG = 1


def _gemm(m: float, n: float, k: float) -> float:
    return 2.0 * m * n * k


def _decomposition(n: int, rate: tuple[float, float]) -> float:
    return (rate[0] + rate[1] / max(n, 1)) * _gemm(n, n, n)


def lapack_cost(m: int, n: int) -> float:
    """Predicts the cost of LAPACK's full SVD, by a QR of the longer side where it is much longer."""
    m, n = max(m, n), min(m, n)
    return _decomposition(n, SVD) + (3 * _gemm(m, n, n) if m > 1.2 * n else 0.0)


def turn_width(n: int, rank: int) -> int:
    """Returns how many of n directions take part when `rank` are turned: all, or half as many again."""
    return n if 3 * rank >= n else rank + max(OVERSAMPLING, rank // 2)


def gram_cost(m: int, n: int, rank: int) -> float:
    """Predicts the cost of the exact form by the smaller Gram matrix, when one step of turns suffices."""
    m, n = max(m, n), min(m, n)
    width = turn_width(n, rank)
    turns = _gemm(m, n, width) + _gemm(2 * m + n, width, rank) + 2 * _gemm(m + n, rank, rank)
    return _gemm(m, n, n) / 2 + _decomposition(n, EIGH) + TURNING * turns


def iterates_by_gram(m: int, n: int, rank: int) -> bool:
    """Returns whether power iterations with aᵀa cost less than those with a."""
    return _iterations_by_gram(m, n, rank) < _iterations(m, n, rank)


def _iterations(m: int, n: int, rank: int) -> float:
    """A sketch, two passes a power iteration, the last pass, and a basis for each."""
    m, n = max(m, n), min(m, n)
    width = min(rank + OVERSAMPLING, n)
    bases = (ITERATIONS + 1) * ONE_PASS + REFINEMENT * (m + n) / (2 * max(m, 1))
    return (2 * ITERATIONS + 2) * _gemm(m, n, width) + bases * _gemm(m, width, width)


def _iterations_by_gram(m: int, n: int, rank: int) -> float:
    """The Gram matrix, a pass over it per iteration, and two over a."""
    m, n = max(m, n), min(m, n)
    width = min(rank + OVERSAMPLING, n)
    iterations = ITERATIONS + LAG
    passes = _gemm(m, n, n) / 2 + (iterations + 1) * _gemm(n, n, width) + 2 * _gemm(m, n, width)
    return passes + (iterations * ONE_PASS * n / max(m, 1) + TWO_PASSES) * _gemm(m, width, width)


def randomized_cost(m: int, n: int, rank: int) -> float:
    """Predicts the cost of the randomized form with `ITERATIONS` power iterations."""
    m, n = max(m, n), min(m, n)
    width = min(rank + OVERSAMPLING, n)
    iterations = min(_iterations(m, n, rank), _iterations_by_gram(m, n, rank))
    small = TWO_PASSES * _gemm(n, width, width) + _decomposition(width, SVD) + _gemm(m + n, width, rank)
    return iterations + small


def exact_form(m: int, n: int, rank: int, *, is_single: bool) -> Form:
    """Returns the cheaper exact form; in float64 that is LAPACK's."""
    p = min(m, n)
    is_gram = is_single and p >= GRAM_FROM and rank <= GRAM_UP_TO * p
    is_gram = is_gram and gram_cost(m, n, rank) < lapack_cost(m, n)
    return "gram" if is_gram else "lapack"


def cheapest_form(m: int, n: int, rank: int, *, is_single: bool) -> Form:
    """Returns the form that "auto" takes: exact for small matrices and large ranks, else the cheaper one."""
    p, exact = min(m, n), exact_form(m, n, rank, is_single=is_single)
    if p <= EXACT_UP_TO or rank > GRAM_UP_TO * p:
        return exact
    return "randomized" if randomized_cost(m, n, rank) < form_cost(m, n, rank, exact) else exact


def form_cost(m: int, n: int, rank: int, form: Form) -> float:
    """Predicts the cost of a form."""
    if form == "lapack":
        return lapack_cost(m, n)
    return gram_cost(m, n, rank) if form == "gram" else randomized_cost(m, n, rank)
