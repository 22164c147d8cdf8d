"""Linear algebra of directional merging: truncated SVD, polar factor, Procrustes rotation, simplex ETF.

Everything takes torch tensors, NumPy or CuPy arrays without a copy and returns what it was given (see
dirmerge.arrays), is batched over leading dimensions, works in float32 (float64 for float64 inputs) and never
changes its inputs. GEMM, QR, SVD and eigh are torch's (MKL, cuBLAS, cuSOLVER); what those libraries lack is
in `dirmerge.ops`.
"""

from dirmerge import ops
from dirmerge.arrays import of_any_kind
from dirmerge.linalg._common import (
    MatrixLike,
    all_finite,
    kept_directions,
    numerical_rank,
    seed_for,
    single_thread,
)
from dirmerge.linalg.etf import etf_gap, simplex_etf
from dirmerge.linalg.orthogonal import GramRoot, Polar, PolarMethod, gram_root, polar, procrustes
from dirmerge.linalg.svd import SVDMethod, TruncatedSVD, svd_flops, svd_truncated

elect_merge = of_any_kind(ops.elect_merge)
etf_project = of_any_kind(ops.etf_project)
kth_largest_magnitude = of_any_kind(ops.kth_largest_magnitude)

__all__ = [
    "GramRoot",
    "MatrixLike",
    "Polar",
    "PolarMethod",
    "SVDMethod",
    "TruncatedSVD",
    "all_finite",
    "elect_merge",
    "etf_gap",
    "etf_project",
    "gram_root",
    "kept_directions",
    "kth_largest_magnitude",
    "numerical_rank",
    "polar",
    "procrustes",
    "seed_for",
    "simplex_etf",
    "single_thread",
    "svd_flops",
    "svd_truncated",
]
