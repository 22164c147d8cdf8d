"""WUDI: the update that interferes least with every task's row space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dirmerge.deltas.lowrank import LowRank
from dirmerge.linalg.conditions import holds, number
from dirmerge.methods.registry import Cost, register
from dirmerge.methods.scale import Scale
from dirmerge.methods.tasks import MergedDelta, MergeRecord, Tasks, sum_tasks


def _check(options: Mapping[str, Any], adapters: bool) -> None:
    if options.get("solver", "adam") == "exact":
        given = [name for name in ("steps", "lr") if name in options]
        if given:
            raise ValueError(
                f"wudi: {' and '.join(given)} belong to solver='adam'; the exact solver makes no steps"
            )
    elif "cutoff" in options:
        raise ValueError("wudi: cutoff belongs to solver='exact'")


def _cost(shape: tuple[int, ...], ranks: list[int | None], options: Mapping[str, Any]) -> Cost:
    m, n = shape[-2:]
    if options.get("solver", "adam") == "exact":
        if all(rank is not None for rank in ranks):
            k = sum(rank or 0 for rank in ranks)
            return Cost(6.0 * (m + n) * k * k, 4 * 4 * (m + n) * k, k)
        return Cost(4.0 * len(ranks) * m * n * n + 12.0 * n**3, 4 * (4 * m * n + 6 * n * n), None)
    steps = options.get("steps", 300)
    return Cost((4.0 * len(ranks) + 2.0 * steps) * m * n * n, 4 * (7 * m * n + 2 * n * n), None)


@register(
    "least interference with every task's row space",
    scale=Scale(alignment=0.8, at_tasks=8, power=1.0),
    adapter_scale=Scale(alignment=0.44, at_tasks=8, power=1.0),
    check=_check,
    estimate=_cost,
    looks_twice=True,
)
def wudi(
    tasks: Tasks,
    weights: list[float],
    *,
    solver: Literal["adam", "exact"] = "adam",
    steps: Annotated[int, Field(ge=1)] = 300,
    lr: Annotated[float, Field(gt=0)] = 1e-5,
    cutoff: Annotated[float, Field(gt=0, lt=1)] = 1e-4,
    seed: int = 0,
) -> MergedDelta:
    """Minimises Σ_t w_t ‖(X − D_t) D_tᵀ‖²_F / ‖D_t‖²_F over X.

    With H = Σ w_t D_tᵀD_t / ‖D_t‖² and F = Σ w_t D_t D_tᵀD_t / ‖D_t‖² the gradient is 2 (X H − F): one GEMM
    per step instead of T pairs. Adam starts at Σ w_t D_t, as published; the exact minimiser is F H⁺.

    Args:
        tasks: T deltas (m, n), dense or LowRank.
        weights: T weights >= 0 of the loss terms and of the start.
        solver: "adam" (published), or "exact", the minimiser in closed form: factored for adapters.
        steps: of Adam.
        lr: Adam's step size.
        cutoff: of the exact solver: eigenvalues of H below cutoff · largest are left out.
        seed: unused, the method is deterministic.

    Returns:
        MergedDelta. Adam's elementwise steps leave the span of the factors, so its result is dense, for
        adapters too; the exact solver keeps adapters factored with rank at most Σ r_t.

    Source:
        Cheng et al., Whoever started the interference should end it (WUDI-Merging), ICML 2025.
    """
    used = {"solver": solver, **({"cutoff": cutoff} if solver == "exact" else {"steps": steps, "lr": lr})}
    record = MergeRecord("wudi", used, tasks.shape)
    if solver == "exact" and tasks.low_rank:
        return MergedDelta(_exact_low_rank(tasks, weights, cutoff, record), record)
    n = tasks.shape[1]
    gram: Tensor | None = None
    target: Tensor | None = None
    for t, weight in enumerate(weights):
        delta = tasks.dense(t)
        energy = delta.square().sum(dtype=torch.float64)
        if gram is None or target is None:
            gram, target = delta.new_zeros(n, n), torch.zeros_like(delta)
        if not holds(energy != 0):
            record.notes.append(f"{tasks.names[t]}: zero, left out of the loss")
            continue
        own = delta.mT @ delta
        own *= weight / number(energy)
        gram += own
        target.addmm_(delta, own)
        del own, delta
    assert gram is not None
    assert target is not None
    if solver == "exact":
        return MergedDelta(target @ _pseudo_inverse(gram, cutoff), record)
    total = sum_tasks(tasks, weights)
    start = total.dense() if isinstance(total, LowRank) else total
    if tasks.low_rank:
        record.notes.append(
            "Adam's steps are elementwise: the result is dense (solver='exact' keeps it factored)"
        )
    return MergedDelta(_adam(start, gram, target, steps, lr), record)


def _adam(x: Tensor, gram: Tensor, target: Tensor, steps: int, lr: float) -> Tensor:
    """Adam with the published moments (0.9, 0.999, ε = 1e-8) on 2 (X H − F), in place on x."""
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        gradient = torch.addmm(target, x, gram, beta=-2, alpha=2)
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = torch.sqrt(square, out=gradient).div_((1 - 0.999**step) ** 0.5).add_(1e-8)
        x.addcdiv_(mean, root, value=-lr / (1 - 0.9**step))
    return x


def _pseudo_inverse(gram: Tensor, cutoff: float) -> Tensor:
    """H⁺ of a symmetric positive semidefinite H, eigenvalues below cutoff · largest left out, in float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > cutoff * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    if gram.is_cpu:
        kept = vectors[:, keep]
        inverse: Tensor = (kept / values[keep]) @ kept.mT
    else:
        # A slice by values would wait for the device.
        inverse = (vectors * torch.where(keep, 1 / values, 0.0)) @ vectors.mT
    return inverse.to(gram.dtype)


def _exact_low_rank(tasks: Tasks, weights: list[float], cutoff: float, record: MergeRecord) -> LowRank:
    """F H⁺ on the joint row space of the adapters: with D_t = L_t C_t Qᵀ everything but L_t is K × K."""
    pairs = []
    for delta in tasks:
        assert isinstance(delta, LowRank)
        pairs.append(delta.folded())
    frame = torch.linalg.qr(torch.cat([right for _, right in pairs], dim=1)).Q
    k = frame.shape[1]
    gram = torch.zeros(k, k, dtype=torch.float64, device=frame.device)
    cores = []
    for t, ((left, right), weight) in enumerate(zip(pairs, weights, strict=True)):
        coordinates = (right.mT @ frame).double()
        square = coordinates.mT @ (left.double().mT @ left.double()) @ coordinates
        energy = square.trace()
        if not holds(energy != 0):
            record.notes.append(f"{tasks.names[t]}: zero, left out of the loss")
            cores.append(torch.zeros_like(coordinates))
            continue
        factor = weight / number(energy)
        gram += square * factor
        cores.append(coordinates @ square * factor)
    core = torch.cat(cores) @ _pseudo_inverse(gram, cutoff)
    left = torch.cat([left for left, _ in pairs], dim=1)
    record.rank = k
    return LowRank(left @ core.to(left.dtype), None, frame)
