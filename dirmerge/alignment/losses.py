"""The losses of MDA in feature space: entropy, alignment with a simplex, and the rotation's target."""

from __future__ import annotations

import torch
from torch import Tensor

from dirmerge.alignment.heads import CallableHead, Head
from dirmerge.linalg import polar, procrustes, simplex_etf

# Weight of the anchor against the class means in the rotation target.
ANCHOR = 1e-3


def entropy(logits: Tensor) -> Tensor:
    """Computes −mean Σ_c p_c log p_c of softmax(logits), in nats.

    Args:
        logits: (n, C).
    """
    log = torch.log_softmax(logits, dim=-1)
    return -(log.exp() * log).sum(-1).mean()


def alignment_loss(z: Tensor, targets: Tensor, predicted: Tensor) -> Tensor:
    """Computes mean ‖z/‖z‖ − e_ŷ‖².

    Args:
        z: (n, d) rotated features.
        targets: (C, d) unit vectors e_c.
        predicted: (n,) classes ŷ.

    Source:
        MDA (arXiv 2512.00391), L_align.
    """
    unit = torch.nn.functional.normalize(z, dim=-1)
    return (unit - targets.to(z)[predicted]).square().sum(-1).mean()


def rotation_loss(rotation: Tensor, target: Tensor) -> Tensor:
    """Computes ‖R − R*‖²_F / d.

    Source:
        MDA (arXiv 2512.00391), L_rot.
    """
    return (rotation - target).square().sum() / rotation.shape[-1]


def etf_targets(
    head: Head | CallableHead,
    classes: int,
    d: int,
    *,
    mode: str = "head",
    nearest_polar: bool = False,
    seed: int = 0,
) -> Tensor:
    """Builds (C, d) unit targets: the simplex nearest to the head's centred class vectors, or a random one.

    The nearest simplex is E Q with E the vertices in R^(C−1) and Q the polar factor of Eᵀ V, V the centred
    class vectors: the Procrustes solution.

    Args:
        head: the task's head; `mode="head"` needs its weight.
        classes: C.
        d: dimension of the features.
        mode: head or random.
        nearest_polar: for C > d + 1, where no simplex exists: the rows of the polar factor of V, of unit
            length.
        seed: of the random simplex.

    Raises:
        ValueError: C > d + 1 without `nearest_polar`, fewer than two classes, a head without class vectors.

    Source:
        interpretation of MDA (arXiv 2512.00391), whose summary leaves the place of the simplex open.
    """
    if classes < 2:
        raise ValueError(f"a simplex needs at least 2 classes, got {classes}")
    if mode == "random" and classes <= d + 1:
        return simplex_etf(classes, d, seed=seed).T.contiguous()
    if classes > d + 1 and (mode == "random" or not nearest_polar):
        hint = "" if mode == "random" else "; nearest_polar=True takes the vectors nearest to the head's"
        raise ValueError(
            f"no simplex of {classes} classes exists in R^{d}, at most {d + 1} fit (targets={mode}){hint}"
        )
    if not isinstance(head, Head):
        raise ValueError("targets='head' needs a head of class vectors, got a function; use targets='random'")
    centred = head.weight.detach().double()
    centred = centred - centred.mean(0)
    if classes > d + 1:
        frame = polar(centred, "exact").q
        return torch.nn.functional.normalize(frame, dim=-1).float()
    vertices = simplex_etf(classes, classes - 1, dtype=torch.float64).T.to(centred.device)
    frame = polar((vertices.T @ centred).mT, "exact").q.mT
    return (vertices @ frame).float()


def rotation_target(means: Tensor, targets: Tensor, present: Tensor, anchor: Tensor) -> Tensor:
    """Computes R* = argmin over SO(d) of Σ_c ‖μ_c R − s e_c‖² + ε ‖R − R_0‖², the rotation of class means.

    The SVD of Σ_c e_c μ_cᵀ fixes R* on at most C of d directions: a small anchor fills the others from R_0,
    where any completion would be as good and most would turn features for no reason (interpretation).

    Args:
        means: (C, d) running class means μ_c of unrotated features.
        targets: (C, d) e_c.
        present: (C,) bool, the classes that were predicted at least once.
        anchor: (d, d) R_0.

    Returns:
        (d, d) R*, for rows: μ_c R* ≈ e_c up to scale.

    Source:
        MDA (arXiv 2512.00391), R_t*.
    """
    a, b = means[present].double(), targets[present].double().to(means.device)
    # Σ_c e_c = 0, so a common mean has no say where all classes are present; it is taken out for the others.
    a = a - a.mean(0)
    weight = (ANCHOR * float(torch.linalg.matrix_norm(a.T @ b)) + torch.finfo(torch.float32).tiny) ** 0.5
    eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    return procrustes(torch.cat([a, weight * eye]), torch.cat([b, weight * anchor.double()])).to(means.dtype)
