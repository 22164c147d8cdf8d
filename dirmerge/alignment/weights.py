"""Weights W = W_0 + Σ_c λ_c D_c that learn their λ: ∂L/∂λ_c = ⟨∂L/∂W, D_c⟩, from one backward pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dirmerge.alignment.model import Model, device_of
from dirmerge.deltas.lowrank import LowRank
from dirmerge.methods.tasks import Delta


@dataclass(frozen=True, eq=False)
class _Entry:
    """One parameter: its base, its updates, and the row of λ that scales them.

    Updates are either `dense` (components, entries) or `left` (m, K) and `right` (n, K) with `component`
    (K,), the component of every column.
    """

    name: str
    group: int
    base: Tensor
    weight: Tensor
    dense: Tensor | None
    left: Tensor | None
    right: Tensor | None
    component: Tensor | None


class ScaledUpdates:
    """The merged weights as a function of λ, for gradient steps on λ.

    Autograd sees W as leaves: one backward pass over any number of tasks gives ∂L/∂W, and the inner products
    with the updates follow. Memory: W, ∂L/∂W and the updates, low-rank ones as factors; nothing grows with
    the number of tasks but what the caller gives as components.

    Args:
        model: the base model.
        updates: by parameter name its components: one merged D, or D_1 … D_T; each parameter's are asked for
            once, one parameter after another, so a mapping that reads them keeps no second copy.
        scale: λ at the start, one for all or by name.
        per: whether λ belongs to a parameter, a block or the model.

    Raises:
        ValueError: no update, numbers of components or shapes that differ, or one λ for parameters that start
            with different ones.
    """

    def __init__(
        self,
        model: Model,
        updates: Mapping[str, Delta | Sequence[Delta]],
        scale: float | Mapping[str, float],
        per: str = "parameter",
    ) -> None:
        if not updates:
            raise ValueError("updates must name at least one parameter")
        self.components = 0
        self.groups: list[str] = []
        self._entries: list[_Entry] = []
        start: dict[str, float] = {}
        for name in updates:
            value = updates[name]
            deltas = [value] if isinstance(value, Tensor | LowRank) else list(value)
            self.components = self.components or len(deltas)
            if not deltas or len(deltas) != self.components:
                counts = sorted({self.components, len(deltas)})
                raise ValueError(f"every parameter must have the same number of updates, got {counts}")
            group = group_of(name, per)
            own_scale = scale[name] if isinstance(scale, Mapping) else scale
            if start.setdefault(group, own_scale) != own_scale:
                raise ValueError(
                    f"{name} starts with λ = {own_scale:g} and shares λ per {per} with parameters that start "
                    f"with {start[group]:g}: learn λ per parameter"
                )
            if group not in self.groups:
                self.groups.append(group)
            self._entries.append(_entry(model, name, self.groups.index(group), deltas))
        device = device_of(model)
        self._given = model
        # λ is a handful of numbers: float64 costs nothing and keeps the sums of a block exact.
        rows = [[start[group]] * self.components for group in self.groups]
        self.start = torch.tensor(rows, dtype=torch.float64).to(device)
        # The other weights are detached: they need no gradient, and the module's own must not collect one.
        frozen = {name: value.detach() for name, value in model.module.named_parameters()}
        leaves = {entry.name: entry.weight for entry in self._entries}
        self.model = Model(model.module, {**frozen, **model.weights, **leaves})
        self.set(self.start)

    @property
    def names(self) -> list[str]:
        """The parameters that have updates."""
        return [entry.name for entry in self._entries]

    @torch.no_grad()
    def set(self, scales: Tensor) -> None:
        """Sets the model's weights to those of λ (groups, components)."""
        for entry in self._entries:
            row = scales[entry.group].to(entry.base.device)
            if entry.dense is not None:
                change = (row.to(entry.dense) @ entry.dense).view(entry.base.shape)
                if _same(entry, change):
                    torch.add(entry.base, change, out=entry.weight)
                else:
                    entry.weight.copy_(entry.base.to(change.dtype) + change)
                continue
            assert entry.left is not None  # either dense or factors
            assert entry.right is not None
            left = entry.left * row.to(entry.left)[entry.component]
            if _same(entry, left):
                torch.addmm(entry.base, left, entry.right.T, out=entry.weight)
            else:
                entry.weight.copy_(torch.addmm(entry.base.to(left.dtype), left, entry.right.T))

    def merged(self) -> Model:
        """Returns the model at the λ set last; its weights are those of this object, detached."""
        leaves = {entry.name: entry.weight.detach() for entry in self._entries}
        return Model(self._given.module, {**self._given.weights, **leaves})

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Returns ∂L/∂λ (groups, components) of what was backpropagated so far, and forgets ∂L/∂W."""
        total = torch.zeros_like(self.start)
        for entry in self._entries:
            found = entry.weight.grad
            if found is None:
                continue
            entry.weight.grad = None
            if entry.dense is not None:
                own = entry.dense @ found.to(entry.dense.dtype).reshape(-1)
            else:
                assert entry.left is not None  # either dense or factors
                assert entry.right is not None
                assert entry.component is not None
                columns = (entry.left * (found.to(entry.left.dtype) @ entry.right)).sum(0)
                own = columns.new_zeros(self.components).index_add_(0, entry.component, columns)
            total[entry.group] += own.to(total)
        return total

    def scales_of(self, scales: Tensor) -> dict[str, list[float]]:
        """Returns λ of every parameter, one number per component."""
        rows = scales.cpu().tolist()
        return {entry.name: list(rows[entry.group]) for entry in self._entries}


def group_of(name: str, per: str) -> str:
    """Returns the name of what a parameter shares its λ with.

    A block is everything up to and with the first number of the name: `encoder.layer.3` of
    `encoder.layer.3.output.dense.weight`; a name without one is a block of its own.
    """
    if per == "parameter":
        return name
    if per == "model":
        return ""
    if per == "block":
        match = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
        return match[0] if match else name
    raise ValueError(f"per must be parameter, block or model, got {per!r}")


def _entry(model: Model, name: str, group: int, deltas: Sequence[Delta]) -> _Entry:
    base = model.weight(name).detach()
    for delta in deltas:
        if tuple(delta.shape) != tuple(base.shape):
            raise ValueError(
                f"{name}: updates must have the shape {tuple(base.shape)}, got {tuple(delta.shape)}"
            )
    weight = torch.empty_like(base, requires_grad=True)
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    columns = sum(delta.rank for delta in low)
    # As factors only where they are the smaller form, and where all are.
    if len(low) == len(deltas) and columns * sum(base.shape) < base.numel() * len(deltas):
        pairs = [delta.folded() for delta in low]
        left = torch.cat([pair[0] for pair in pairs], 1).to(base.device)
        right = torch.cat([pair[1] for pair in pairs], 1).to(base.device)
        index = torch.cat([torch.full((delta.rank,), c) for c, delta in enumerate(low)])
        return _Entry(name, group, base, weight, None, left, right, index.to(base.device))
    parts = [delta.dense() if isinstance(delta, LowRank) else delta for delta in deltas]
    dense = parts[0].detach().reshape(1, -1) if len(parts) == 1 else torch.stack(parts).flatten(1)
    return _Entry(name, group, base, weight, dense.to(base.device), None, None, None)


def _same(entry: _Entry, update: Tensor) -> bool:
    return entry.base.dtype == update.dtype
