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
        value = ops.delta(self.finetuned, self.base).value
        return value.mT if self.is_transposed else value

    def sketch(self, width: int, seed: int) -> ops.DeltaSketch:
        """Computes D Ω with the random signs Ω of `ops.delta_sketch`, ‖D‖²_F and the non-finite entries."""
        return ops.delta_sketch(
            self.base, [self.finetuned], width=width, seed=seed, transposed=self.is_transposed
        )

    def __matmul__(self, x: Tensor) -> Tensor:
        """Computes D x for x (n, s)."""
        found = ops.delta_sketch(self.base, [self.finetuned], x, transposed=self.is_transposed)
        return found.value[0]

    def gram(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Computes DᵀD, with what the same pass over the weights finds.

        Args:
            dtype: of products and sums.

        Returns:
            (n, n) of that dtype, ‖D‖²_F as float64 and the number of non-finite entries as int64, 0-dim.
        """
        n = self.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        nonfinite = torch.zeros((), dtype=torch.int64, device=self.device)
        gram = torch.zeros(n, n, dtype=dtype, device=self.device)
        for piece in self._pieces():
            add_gram_(gram, piece.value.to(dtype))
            total += piece.sum_of_squares
            nonfinite += piece.nonfinite
        mirror_(gram)
        return gram, total, nonfinite

    def _pieces(self) -> Iterator[ops.Delta]:
        """Yields the difference in blocks of whole rows."""
        finetuned, base = self.finetuned, self.base
        if self.is_transposed:
            finetuned, base = finetuned.mT, base.mT
        rows = max(1, _PIECE // max(base.shape[1], 1))
        for part, other in zip(finetuned.split(rows), base.split(rows), strict=True):
            yield ops.delta(part, other)
