"""Difference: a task matrix W_t − W_0 that is never formed as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.ops.gram import add_gram_, mirror_

# Elements of the difference that exist at a time on a CPU: 4 MB in float32.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class Difference:
    """The matrix W_t − W_0, multiplied tile by tile as the two weights are read.

    Whatever reads it raises ValueError where the difference is NaN or infinite.

    Attributes:
        finetuned: (m, n) W_t, any floating dtype.
        base: (m, n) W_0, any floating dtype, same device.
        is_transposed: whether the matrix meant is (W_t − W_0)ᵀ.
    """

    finetuned: Tensor
    base: Tensor
    is_transposed: bool = False

    def __post_init__(self) -> None:
        if self.finetuned.ndim != 2 or self.finetuned.shape != self.base.shape:
            raise ValueError(
                "finetuned and base must have the same shape (m, n), got "
                f"{tuple(self.finetuned.shape)} and {tuple(self.base.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        """(m, n), or (n, m) of the transpose."""
        m, n = self.base.shape
        return torch.Size((n, m)) if self.is_transposed else self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float64 if a weight is, else float32."""
        double = torch.float64 in (self.finetuned.dtype, self.base.dtype)
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        """Of both weights."""
        return self.base.device

    @property
    def mT(self) -> Difference:  # noqa: N802  torch's name
        """The transpose."""
        return replace(self, is_transposed=not self.is_transposed)

    def dense(self) -> Tensor:
        """Returns the difference as one tensor, float32 (float64 if a weight is)."""
        found = ops.delta(self.finetuned, self.base)
        _check_finite(found.nonfinite)
        return found.value.mT if self.is_transposed else found.value

    def sketch(self, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """Computes D Ω (m, width) with the random signs Ω of `ops.delta_sketch`, and ‖D‖²_F (float64)."""
        found = ops.delta_sketch(
            self.base, [self.finetuned], width=width, seed=seed, transposed=self.is_transposed
        )
        _check_finite(found.nonfinite)
        return found.value[0], found.sum_of_squares[0]

    def __matmul__(self, x: Tensor) -> Tensor:
        """Computes D x for x (n, s)."""
        found = ops.delta_sketch(self.base, [self.finetuned], x, transposed=self.is_transposed)
        return found.value[0]

    def add_to_(self, total: Tensor, weight: float) -> None:
        """Adds weight · D to total (m, n), in place."""
        total = total.mT if self.is_transposed else total
        start = 0
        for piece in self._pieces():
            _check_finite(piece.nonfinite)
            rows = piece.value.shape[0]
            total[start : start + rows].add_(piece.value, alpha=weight)
            start += rows

    def gram(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Computes DᵀD (n, n) with products and sums in dtype, and ‖D‖²_F (float64) from the same pass."""
        n = self.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        gram = torch.zeros(n, n, dtype=dtype, device=self.device)
        for piece in self._pieces(self.is_transposed):
            _check_finite(piece.nonfinite)
            add_gram_(gram, piece.value.to(dtype))
            total += piece.sum_of_squares
        mirror_(gram)
        return gram, total

    def _pieces(self, by_columns: bool = False) -> Iterator[ops.Delta]:
        """Yields W_t − W_0 in blocks of whole rows, or its transpose in blocks of its whole rows."""
        finetuned, base = self.finetuned, self.base
        if by_columns:
            finetuned, base = finetuned.mT, base.mT
        m, n = base.shape
        rows = max(1, _PIECE // max(n, 1))
        for start in range(0, m, rows):
            stop = start + rows
            yield ops.delta(finetuned[start:stop], base[start:stop])


def _check_finite(nonfinite: Tensor) -> None:
    count = int(nonfinite.sum())
    if count:
        raise ValueError(f"W_t − W_0 must be finite, got {count} entries of NaN or Inf")
