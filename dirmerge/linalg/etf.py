"""Simplex equiangular tight frames, and how far a set of vectors is from one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dirmerge.arrays import of_any_kind
from dirmerge.linalg._common import finite, working
from dirmerge.linalg.orthogonal import orthogonality


@of_any_kind
def simplex_etf(
    k: int,
    d: int,
    *,
    frame: Tensor | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Builds a simplex equiangular tight frame M = √(k/(k−1)) Q (I − 11ᵀ/k).

    Its columns are k unit vectors of R^d with mutual cosine −1/(k−1).

    Args:
        k: number of vertices, at least 2.
        d: dimension, at least k − 1 (and at least k when a frame is given).
        frame: (d, k) orthonormal columns Q; default the canonical axes, or a Haar-random frame when `seed`
            is given.
        seed: of the random frame.
        dtype: float32 or float64.

    Returns:
        (d, k): column j is vertex j.

    Raises:
        ValueError: when no such simplex exists (k > d + 1), or the frame is not (d, k) orthonormal.

    Source:
        Papyan, Han, Donoho, PNAS 117 (2020); MDA, arXiv 2512.00391.
    """
    if k < 2:
        raise ValueError(f"k must be at least 2, got {k}")
    if k > d + 1:
        raise ValueError(
            f"no simplex ETF of k = {k} vertices exists in R^{d}: k must be at most d + 1 = {d + 1}"
        )
    centred = torch.eye(k, dtype=torch.float64) - 1.0 / k
    centred *= math.sqrt(k / (k - 1))
    if frame is not None:
        if frame.shape != (d, k):
            raise ValueError(f"frame must have shape ({d}, {k}), got {tuple(frame.shape)}")
        if seed is not None:
            raise ValueError("seed makes a random frame, so it must be None when a frame is given")
        if float(orthogonality(frame.double())) > 1e-3:
            raise ValueError("frame must have orthonormal columns")
        return (frame.double() @ centred.to(frame.device)).to(dtype)
    # k vertices span k − 1 dimensions: coordinates on an orthonormal basis of 1⊥ serve every d ≥ k − 1.
    basis = torch.linalg.qr(centred[:, : k - 1]).Q
    coordinates: Tensor = basis.T @ centred
    if seed is None:
        if d >= k:
            return torch.cat([centred, centred.new_zeros(d - k, k)]).to(dtype)
        return coordinates.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(d, k - 1, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # The sign of R's diagonal makes Q Haar-distributed (Mezzadri, Notices AMS 54, 2007).
    vertices: Tensor = (q * r.diagonal().sign()) @ coordinates
    return vertices.to(dtype)


@of_any_kind
def etf_gap(vectors: Tensor) -> float:
    """Computes Δ_ETF = ‖Ĝ − G*‖_F / ‖G*‖_F, how far k vectors are from a simplex ETF.

    Ĝ is the Gram matrix of the centred, normalised columns, G* = (k I − 11ᵀ) / (k − 1).

    Args:
        vectors: (d, k), column j is vector j; k >= 2.

    Returns:
        0 for a simplex ETF.

    Raises:
        ValueError: for fewer than two vectors, or vectors that coincide with their mean.

    Source:
        MDA, arXiv 2512.00391, Δ_ETF.
    """
    x = finite(working(vectors, "vectors"), "vectors").double()
    k = x.shape[-1]
    if x.ndim != 2 or k < 2:
        raise ValueError(f"vectors must have shape (d, k) with k >= 2, got {tuple(vectors.shape)}")
    x = x - x.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(x, dim=0)
    if bool((norms == 0).any()):
        raise ValueError("vectors must differ from their mean: a centred vector is zero")
    x = x / norms
    ideal = (k * torch.eye(k, dtype=torch.float64, device=x.device) - 1) / (k - 1)
    return float(torch.linalg.matrix_norm(x.T @ x - ideal) / torch.linalg.matrix_norm(ideal))
