"""LowRank: a matrix left · core · rightᵀ that is never multiplied out unless asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dirmerge.linalg import TruncatedSVD, single_thread
from dirmerge.linalg.conditions import holds, is_deferred


@dataclass(frozen=True, eq=False)
class LowRank:
    """The (m, n) matrix left · core · rightᵀ.

    Args:
        left: (m, k) floating point.
        core: (k, k), or None for the identity.
        right: (n, k), same dtype and device as left.

    Raises:
        TypeError: for parts that are not tensors.
        ValueError: for shapes, dtypes or devices that do not fit together.
    """

    left: Tensor
    core: Tensor | None
    right: Tensor

    def __post_init__(self) -> None:
        parts = {"left": self.left, "right": self.right}
        if self.core is not None:
            parts["core"] = self.core
        for name, part in parts.items():
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(part).__name__}")
            if part.ndim != 2:
                raise ValueError(f"{name} must be a matrix, got shape {tuple(part.shape)}")
            if not part.is_floating_point():
                raise ValueError(f"{name} must be a floating-point tensor, got {part.dtype}")
            if part.dtype != self.left.dtype or part.device != self.left.device:
                raise ValueError(
                    f"{name} must have the dtype and device of left ({self.left.dtype}, {self.left.device}), "
                    f"got {part.dtype}, {part.device}"
                )
        k = self.left.shape[1]
        if self.right.shape[1] != k:
            raise ValueError(
                f"left and right must have the same number of columns, got shapes {tuple(self.left.shape)} "
                f"and {tuple(self.right.shape)}"
            )
        if self.core is not None and self.core.shape != (k, k):
            raise ValueError(f"core must have shape ({k}, {k}), got {tuple(self.core.shape)}")

    @classmethod
    def from_lora(cls, b: Tensor, a: Tensor, scaling: float = 1.0) -> LowRank:
        """Returns scaling · b a, the update of a LoRA adapter.

        Args:
            b: (m, r), lora_B.
            a: (r, n), lora_A.
            scaling: PEFT's factor: alpha / r, or alpha / √r with rsLoRA.
        """
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        left = b.to(dtype)
        return cls(left if scaling == 1 else left * scaling, None, a.to(dtype).mT)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """The number of columns k: an upper bound of the mathematical rank."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return self.left.device

    @property
    def T(self) -> LowRank:  # noqa: N802  (torch's name of the transpose)
        """The (n, m) transpose."""
        return LowRank(self.right, None if self.core is None else self.core.mT, self.left)

    def to(self, kind: torch.dtype | torch.device) -> LowRank:
        """Returns the same matrix in another floating dtype, or on another device."""
        core = None if self.core is None else self.core.to(kind)
        return LowRank(self.left.to(kind), core, self.right.to(kind))

    def scaled(self, factor: float) -> LowRank:
        """Returns factor · self; the factor goes into the smallest part. Self for a factor of 1."""
        if factor == 1:
            return self
        if self.core is None:
            return LowRank(self.left * factor, None, self.right)
        return LowRank(self.left, self.core * factor, self.right)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns (left', right') with left' right'ᵀ the product: the core goes into the shorter side."""
        if self.core is None:
            return self.left, self.right
        if self.left.shape[0] <= self.right.shape[0]:
            return self.left @ self.core, self.right
        return self.left, self.right @ self.core.mT

    def dense(self) -> Tensor:
        """Returns the (m, n) product."""
        left, right = self.folded()
        return left @ right.mT

    def inner(self, other: LowRank) -> float:
        """Computes ⟨self, other⟩ = tr(selfᵀ other) from k × k Gram matrices in float64."""
        if self.shape != other.shape:
            raise ValueError(f"both must have the same shape, got {self.shape} and {other.shape}")
        a, b = self.folded()
        c, d = other.folded()
        # tr((a bᵀ)ᵀ c dᵀ) = Σ_ij (aᵀc)_ij (bᵀd)_ij
        return float(((a.double().mT @ c.double()) * (b.double().mT @ d.double())).sum())

    def norm(self) -> float:
        """Computes ‖self‖_F without the product (to 1e-8 ‖left‖ ‖right‖, float64 Gram matrices)."""
        return math.sqrt(max(self.inner(self), 0.0))

    @staticmethod
    def sum(terms: Sequence[LowRank]) -> LowRank:
        """Returns Σ terms as one LowRank of rank Σ k_t: columns side by side, exact."""
        if not terms:
            raise ValueError("terms must not be empty")
        shape = terms[0].shape
        for term in terms:
            if term.shape != shape:
                raise ValueError(f"all terms must have shape {shape}, got {term.shape}")
        if len(terms) == 1:
            return terms[0]
        pairs = [term.folded() for term in terms]
        return LowRank(
            torch.cat([left for left, _ in pairs], 1), None, torch.cat([right for _, right in pairs], 1)
        )

    def svd(self, *, may_depend: bool = False) -> TruncatedSVD:
        """Computes the exact SVD in O((m + n) k²): thin QRs of both sides and the SVD of the small core.

        Args:
            may_depend: whether columns of a side are likely to be dependent; where decisions are deferred,
                Householder's QR is taken then, which needs none.

        Returns:
            TruncatedSVD of rank min(k, m, n) (null directions included, with singular value 0 up to
            rounding).

        Source:
            algorithm: with left = Q_l R_l, right = Q_r R_r, the SVD of R_l core R_rᵀ.
        """
        work = torch.promote_types(self.dtype, torch.float32)
        with single_thread(self.rank):
            times_left, rl = _orthogonalised(self.left.to(work), may_depend)
            times_right, rr = _orthogonalised(self.right.to(work), may_depend)
            middle = rl @ rr.mT if self.core is None else rl @ self.core.double() @ rr.mT
            # The small SVD is cheap, so it runs in float64 and adds no error of its own.
            u, s, vh = torch.linalg.svd(middle, full_matrices=False)
            left, right = times_left(u).to(work), times_right(vh.mT).to(work)
        total = s.square().sum()
        gain = torch.zeros_like(total)
        return TruncatedSVD(left, s.to(work), right, total, "exact", 0, gain)

    def truncate(self, rank: int) -> tuple[LowRank, float]:
        """Returns the best approximation of the given rank and the energy it keeps (1 for a zero matrix)."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        svd = self.svd().truncated(rank)
        return LowRank(svd.u * svd.s, None, svd.v), float(svd.energy)


def _orthogonalised(x: Tensor, may_depend: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Returns c ↦ Q c and R (float64) of the thin QR x = Q R.

    Tall float32 factors take Cholesky's R of the float64 Gram matrix, twice as fast as Householder's and as
    accurate as float32 needs up to the condition its diagonal shows; the others take Householder's.
    """
    is_tall = x.dtype == torch.float32 and x.shape[0] >= 4 * x.shape[1] > 0
    if is_tall and not (may_depend and is_deferred(x)):
        double = x.double()
        lower, info = torch.linalg.cholesky_ex(double.mT @ double)
        diagonal = lower.diagonal()
        if holds((info == 0) & (diagonal.min() > 1e-4 * diagonal.max())):
            r = lower.mT
            return lambda c: double @ torch.linalg.solve_triangular(r, c, upper=True), r
    q, r = torch.linalg.qr(x)
    return lambda c: q @ c.to(q.dtype), r.double()
