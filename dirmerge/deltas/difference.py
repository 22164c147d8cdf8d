"""Difference: a task matrix W_t − W_0 that is never formed as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.linalg.conditions import holds
from dirmerge.ops.gram import add_gram_, mirror_

# Elements of the difference that exist at a time on a CPU: 4 MB in float32.
_PIECE = 1 << 20


@dataclass(frozen=True, eq=False)
class Difference:
    """The matrix W_t − W_0, multiplied tile by tile as the two weights are read; or T of them on one W_0.

    Whatever reads it raises ValueError where the difference is NaN or infinite; where decisions are deferred
    (see `linalg.conditions`) it notes that it is not.

    Attributes:
        finetuned: (m, n) W_t, any floating dtype; or a tuple of T such weights of one dtype, a batch that
            shares every read of W_0.
        base: (m, n) W_0, any floating dtype, same device.
        is_transposed: whether the matrix meant is (W_t − W_0)ᵀ.
    """

    finetuned: Tensor | tuple[Tensor, ...]
    base: Tensor
    is_transposed: bool = False

    def __post_init__(self) -> None:
        if self.base.ndim != 2 or not self.weights:
            raise ValueError(f"base must have shape (m, n), got {tuple(self.base.shape)}, and T be 1 or more")
        for weight in self.weights:
            if weight.shape != self.base.shape:
                raise ValueError(
                    "finetuned and base must have the same shape (m, n), got "
                    f"{tuple(weight.shape)} and {tuple(self.base.shape)}"
                )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The fine-tuned weights: one, or T of a batch."""
        return (self.finetuned,) if isinstance(self.finetuned, Tensor) else self.finetuned

    @property
    def shape(self) -> torch.Size:
        """([T,] m, n), or ([T,] n, m) of the transpose."""
        m, n = self.base.shape
        batch = () if isinstance(self.finetuned, Tensor) else (len(self.weights),)
        return torch.Size((*batch, n, m) if self.is_transposed else (*batch, m, n))

    @property
    def ndim(self) -> int:
        """2, or 3 of a batch."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float64 if a weight is, else float32."""
        double = torch.float64 in (self.weights[0].dtype, self.base.dtype)
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        """Of all weights."""
        return self.base.device

    @property
    def mT(self) -> Difference:  # noqa: N802  torch's name
        """The transpose."""
        return replace(self, is_transposed=not self.is_transposed)

    def dense(self) -> Tensor:
        """Returns the differences as one tensor of `shape`, float32 (float64 if a weight is)."""
        values = []
        for weight in self.weights:
            found = ops.delta(weight, self.base)
            _check_finite(found.nonfinite)
            values.append(found.value)
        value = self._unbatched(torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0))
        return value.mT if self.is_transposed else value

    def sketch(self, width: int, seed: int) -> tuple[Tensor, Tensor]:
        """Computes D Ω with the random signs Ω of `ops.delta_sketch`, and ‖D‖²_F from the same pass.

        Returns:
            ([T,] m, width), and ([T]) float64.
        """
        found = ops.delta_sketch(
            self.base, self.weights, width=width, seed=seed, transposed=self.is_transposed
        )
        _check_finite(found.nonfinite)
        return self._unbatched(found.value), self._unbatched(found.sum_of_squares)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Computes D x ([T,] m, s) for x ([T,] n, s)."""
        found = ops.delta_sketch(self.base, self.weights, x, transposed=self.is_transposed)
        return self._unbatched(found.value)

    def add_to_(self, total: Tensor, weight: float) -> None:
        """Adds weight · D to total (m, n), in place; of a batch, weight · Σ_t D_t."""
        total = total.mT if self.is_transposed else total
        for finetuned in self.weights:
            start = 0
            for piece in self._pieces(finetuned):
                _check_finite(piece.nonfinite)
                rows = piece.value.shape[0]
                total[start : start + rows].add_(piece.value, alpha=weight)
                start += rows

    def gram(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Computes DᵀD with products and sums in dtype, and ‖D‖²_F from the same pass.

        Returns:
            ([T,] n, n), and ([T]) float64.
        """
        n, count = self.shape[-1], len(self.weights)
        total = torch.zeros(count, dtype=torch.float64, device=self.device)
        gram = torch.zeros(count, n, n, dtype=dtype, device=self.device)
        for t, finetuned in enumerate(self.weights):
            for piece in self._pieces(finetuned, self.is_transposed):
                _check_finite(piece.nonfinite)
                add_gram_(gram[t], piece.value.to(dtype))
                total[t] += piece.sum_of_squares
        mirror_(gram)
        return self._unbatched(gram), self._unbatched(total)

    def _unbatched(self, x: Tensor) -> Tensor:
        return x[0] if isinstance(self.finetuned, Tensor) else x

    def _pieces(self, finetuned: Tensor, by_columns: bool = False) -> Iterator[ops.Delta]:
        """Yields W_t − W_0 in blocks of whole rows, or its transpose in blocks of its whole rows."""
        base = self.base
        if by_columns:
            finetuned, base = finetuned.mT, base.mT
        m, n = base.shape
        rows = max(1, _PIECE // max(n, 1))
        for start in range(0, m, rows):
            stop = start + rows
            yield ops.delta(finetuned[start:stop], base[start:stop])


def _check_finite(nonfinite: Tensor) -> None:
    if not holds(nonfinite == 0):
        raise ValueError(f"W_t − W_0 must be finite, got {int(nonfinite.sum())} entries of NaN or Inf")
