"""delta_sketch: products of task matrices with a thin matrix, without forming the task matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dirmerge.backends import implements
from dirmerge.ops._registration import check_floating, compute_dtype, register
from dirmerge.ops.delta import delta


class DeltaSketch(NamedTuple):
    """Sketches of T task matrices, their ‖D_t‖²_F, and how many of their entries are NaN or infinite."""

    value: torch.Tensor
    sum_of_squares: torch.Tensor
    nonfinite: torch.Tensor


def _check(
    base: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    test: torch.Tensor | None,
    width: int,
    seed: int,
    transposed: bool,
) -> None:
    check_floating("delta_sketch", base=base, **{f"finetuned[{t}]": w for t, w in enumerate(finetuned)})
    if base.dim() != 2:
        raise ValueError(f"delta_sketch: base must have shape (m, n), got {tuple(base.shape)}")
    for t, weight in enumerate(finetuned):
        if weight.shape != base.shape:
            raise ValueError(
                f"delta_sketch: finetuned[{t}] must have the shape of base, {tuple(base.shape)}, got "
                f"{tuple(weight.shape)}"
            )
        if weight.dtype != finetuned[0].dtype:
            raise TypeError(
                f"delta_sketch: all of finetuned must have one dtype, got {finetuned[0].dtype} and "
                f"{weight.dtype}"
            )
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"delta_sketch: seed must be from 0 to 2⁶³ − 1, got {seed}")
    if test is None:
        if width < 1:
            raise ValueError(f"delta_sketch: width must be at least 1 without a test matrix, got {width}")
        return
    check_floating("delta_sketch", base=base, test=test)
    rows = base.shape[0 if transposed else 1]
    if test.dim() not in (2, 3) or test.shape[-2] != rows or test.shape[:-2] not in ((), (len(finetuned),)):
        raise ValueError(
            f"delta_sketch: test must have shape ({rows}, s) or ({len(finetuned)}, {rows}, s), got "
            f"{tuple(test.shape)}"
        )
    if test.shape[-1] != width:
        raise ValueError(f"delta_sketch: width must be that of test, {test.shape[-1]}, got {width}")


def _fake(
    base: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    test: torch.Tensor | None = None,
    *,
    width: int,
    seed: int = 0,
    transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(base, finetuned, test, width, seed, transposed)
    T = len(finetuned)
    return (
        base.new_empty((T, base.shape[1 if transposed else 0], width), dtype=compute_dtype(base)),
        base.new_empty((T,), dtype=torch.float64),
        base.new_empty((T,), dtype=torch.int64),
    )


_op = register(
    "delta_sketch",
    "(Tensor base, Tensor[] finetuned, Tensor? test=None, *, SymInt width, int seed=0, "
    "bool transposed=False) -> (Tensor value, Tensor sum_of_squares, Tensor nonfinite)",
    fake=_fake,
)

_WORD = 0xFFFFFFFF


def _high_low(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two 32-bit halves of a · b for 32-bit a and b, in int64, which holds no unsigned 64-bit product."""
    upper = b * (a >> 16) + ((b * (a & 0xFFFF)) >> 16)
    return upper >> 16, ((upper << 16) & _WORD) | ((b * (a & 0xFFFF)) & 0xFFFF)


def _philox(seed: int, counter: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 of a counter of four 32-bit words under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        high_0, low_0 = _high_low(0xD2511F53, c0)
        high_2, low_2 = _high_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def random_signs(
    rows: int,
    width: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Makes the random test matrix Ω of delta_sketch: independent signs ±1, the same on every backend.

    Entry (j, c) is −1 where bit c mod 32 of word ⌊c/32⌋ mod 4 of Philox4x32-10 with key seed and counter
    (j, ⌊c/128⌋, 0, 0) is set. Signs rather than normal numbers: sketches of the same quality, exact in every
    dtype, and one Philox call for 128 of them.

    Args:
        rows: number of rows.
        width: number of columns.
        seed: from 0 to 2⁶³ − 1.
        dtype: of the result.
        device: of the result.

    Returns:
        (rows, width).

    Source:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; sign sketches: Halko, Martinsson,
        Tropp, SIAM Review 53 (2011), section 4.6; Martinsson, Tropp, Acta Numerica 29 (2020), section 9.2.
    """
    groups = -(-width // 128)
    row = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    group = torch.arange(groups, device=device).expand(rows, groups)
    zero = torch.zeros_like(row)
    words = torch.stack(_philox(seed, (row, group, zero, zero)), -1)
    bits = (words[..., None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits.view(rows, 128 * groups)[:, :width]).to(dtype)


# Differences are formed in pieces of whole rows: the whole matrix in float32 would be the largest temporary.
_PIECE = 1 << 20


@implements("delta_sketch", "torch")
def _delta_sketch_torch(
    base: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    test: torch.Tensor | None = None,
    *,
    width: int,
    seed: int = 0,
    transposed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(base)
    m, n = base.shape
    if test is None:
        test = random_signs(m if transposed else n, width, seed, dtype=dtype, device=base.device)
    test = test.to(dtype)
    T = len(finetuned)
    value = base.new_zeros((T, n if transposed else m, width), dtype=dtype)
    total = base.new_zeros(T, dtype=torch.float64)
    nonfinite = base.new_zeros(T, dtype=torch.int64)
    rows = max(1, _PIECE // max(n, 1))
    for t in range(T):
        tested = test if test.dim() == 2 else test[t]
        for start in range(0, m, rows):
            part = slice(start, start + rows)
            found = delta(finetuned[t][part], base[part])
            piece = found.value.to(dtype)
            total[t] += found.sum_of_squares
            nonfinite[t] += found.nonfinite
            if transposed:
                value[t].addmm_(piece.mT, tested[part])
            else:
                torch.mm(piece, tested, out=value[t, part])
    return value, total, nonfinite


def delta_sketch(
    base: torch.Tensor,
    finetuned: Sequence[torch.Tensor] | torch.Tensor,
    test: torch.Tensor | None = None,
    *,
    width: int | None = None,
    seed: int = 0,
    transposed: bool = False,
) -> DeltaSketch:
    """Computes Y_t = (W_t − W_0) Ω, or Z_t = (W_t − W_0)ᵀ Q_t, with ‖W_t − W_0‖²_F from the same pass.

    One launch for all tasks. The difference is formed tile by tile as the weights are read, a random Ω where
    it is multiplied; neither is ever in memory as a whole.

    Args:
        base: (m, n) W_0, any floating dtype.
        finetuned: T tensors W_t (m, n) of one floating dtype, or one tensor (T, m, n).
        test: matrix to multiply by, Ω (n, s) or, transposed, Q (m, s); with T in front, one for
            each task. None: the random signs of `random_signs(n or m, width, seed)`.
        width: columns of the random Ω; not with test.
        seed: of the random Ω, from 0 to 2⁶³ − 1.
        transposed: whether the transposed differences are multiplied.

    Returns:
        value: (T, m, s) or, transposed, (T, n, s), float32 (float64 if an input of the difference is);
        sum_of_squares: (T,) float64; nonfinite: (T,) int64, the number of non-finite entries of W_t − W_0.

    Raises:
        TypeError: an input is not a floating tensor, or finetuned mixes dtypes.
        ValueError: shapes, devices or seed do not fit, or not exactly one of test and width.

    Accuracy:
        Differences, products and sums in float32 (float64 for float64), on tensor cores as three bfloat16 or
        TF32 products each; the squares are summed in float64.

    Differentiable:
        No: backward raises NotImplementedError.

    Source:
        Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 4.1.
    """
    weights = list(finetuned.unbind(0)) if isinstance(finetuned, torch.Tensor) else list(finetuned)
    if (test is None) == (width is None):
        raise ValueError("delta_sketch: exactly one of test and width must be given")
    if width is None:
        width = test.shape[-1] if isinstance(test, torch.Tensor) and test.dim() else 0
    _check(base, weights, test, width, seed, transposed)
    # The op computes in the dtype of its first argument.
    if weights and weights[0].dtype == torch.float64:
        base = base.double()
    return DeltaSketch(*_op(base, weights, test, width=width, seed=seed, transposed=transposed))
