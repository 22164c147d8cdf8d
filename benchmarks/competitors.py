"""What a user would write instead: the ops in NumPy's language, for CuPy, and whole methods in plain torch.

The functions of the first half take the array module `xp` and its arrays. The second half is the published
form of the methods on dense deltas, T full SVDs and one per cover space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Array = Any


def delta(xp: Any, finetuned: Array, base: Array) -> Array:
    difference = finetuned.astype(xp.float32) - base.astype(xp.float32)
    return difference, (difference.astype(xp.float64) ** 2).sum(), (~xp.isfinite(difference)).sum()


def delta_sketch(xp: Any, base: Array, finetuned: Sequence[Array], test: Array, transposed: bool) -> Array:
    differences = [w.astype(xp.float32) - base.astype(xp.float32) for w in finetuned]
    return xp.stack([(d.T if transposed else d) @ test for d in differences])


def elect_merge(xp: Any, x: Array, thresholds: Array) -> Array:
    kept = xp.where(xp.abs(x) < thresholds[:, None, None], xp.zeros((), x.dtype), x)
    chosen = kept * (xp.sign(kept) == xp.sign(kept.sum(0)))
    return chosen.sum(0) / xp.maximum((chosen != 0).sum(0), 1)


def etf_project(xp: Any, core: Array) -> Array:
    K = core.shape[-2]
    return K / (K - 1) * (core - core.mean(-2, keepdims=True))


def gram(xp: Any, x: Array) -> Array:
    return x.T @ x


def kth_largest_magnitude(xp: Any, x: Array, k: int) -> Array:
    flat = xp.abs(x).reshape(len(x), -1)
    return xp.partition(flat, flat.shape[1] - k, axis=1)[:, flat.shape[1] - k]


def lowrank_add(xp: Any, base: Array, left: Array, right: Array, scale: float) -> Array:
    return (base.astype(xp.float32) + scale * (left @ right.T)).astype(base.dtype)


def polar_step(xp: Any, x: Array, a: float, b: float, c: float) -> Array:
    g = x.T @ x
    return x @ (a * xp.eye(x.shape[1], dtype=x.dtype) + b * g + c * (g @ g))


def svd(xp: Any, a: Array, rank: int) -> Array:
    u, s, vh = xp.linalg.svd(a, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def polar(xp: Any, x: Array) -> Array:
    u, _, vh = xp.linalg.svd(x, full_matrices=False)
    return u @ vh


def triplets(deltas: Sequence[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    return (
        [u[:, :rank] for u, _, _ in found],
        [s[:rank] for _, s, _ in found],
        [vh[:rank].mT for _, _, vh in found],
    )


def cover(bases: Sequence[Tensor]) -> Tensor:
    u, _, vh = torch.linalg.svd(torch.cat(list(bases), 1), full_matrices=False)
    return u @ vh


def tsv_m(deltas: Sequence[Tensor], rank: int) -> Tensor:
    us, ss, vs = triplets(deltas, rank)
    return (cover(us) * torch.cat(ss)) @ cover(vs).mT


def mda(deltas: Sequence[Tensor], rank: int) -> Tensor:
    us, ss, vs = triplets(deltas, rank)
    # Each singular vector turned so that its largest left entry is positive, as dirmerge does.
    signs = [u.gather(0, u.abs().argmax(0, keepdim=True)).sign() for u in us]
    us, vs = (
        [u * sign for u, sign in zip(us, signs, strict=True)],
        [v * s for v, s in zip(vs, signs, strict=True)],
    )
    core = torch.diag(torch.cat(ss))
    K = len(core)
    return cover(us) @ ((core - core.mean(0)) * (K / (K - 1))) @ cover(vs).mT


def iso_c(deltas: Sequence[Tensor], rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)
    K = rank * len(deltas)
    return s[:K].mean() * (u[:, :K] @ vh[:K])


def dc_merge(deltas: Sequence[Tensor], rank: int, *, average: bool, size: int) -> Tensor:
    """DC-Merge as published; `average`: smoothing of adapters; `size`: d of the filter's 0.001 d² entries."""
    us, ss, vs = triplets(deltas, rank)
    left, right = cover(us), cover(vs)
    coordinates = []
    for u, s, v in zip(us, ss, vs, strict=True):
        c = left.mT @ ((u * (s.mean() if average else s)) @ v.mT) @ right
        threshold = c.abs().flatten().topk(max(1, int(1e-3 * size * size))).values.min()
        coordinates.append(torch.where(c.abs() >= threshold, c, torch.zeros_like(c)))
    stack = torch.stack(coordinates)
    chosen = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    mean = (stack * chosen).sum(0) / chosen.sum(0).clamp(min=1)
    mask = torch.block_diag(*[torch.ones(rank, rank, device=mean.device)] * len(deltas))
    return left @ (mean * mask) @ right.mT
