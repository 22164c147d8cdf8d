"""The plan of a merge: every output tensor, its inputs, its rule and its cost, before a weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dirmerge.checkpoints.adapters import Adapter
from dirmerge.checkpoints.reader import Checkpoint
from dirmerge.methods import Method
from dirmerge.recipe import Recipe, Setting

Rule = Literal["merge", "mean", "base", "take", "common_rows", "identical", "tied", "drop"]


@dataclass(frozen=True)
class Source:
    """What one fine-tune has for a tensor; with none of its three names it leaves the base's unchanged.

    Attributes:
        task: number of the fine-tune, from 0.
        weight: its weight for this tensor.
        tensor: name in the fine-tune's own weight files.
        saved: name of a full tensor in the adapter file (modules_to_save, trained biases).
        module: adapted module whose low-rank update is added.
        rank: rank of the update when it is low-rank alone, None for a dense one.
        dtype: stored dtype of the dense part.
    """

    task: int
    weight: float
    tensor: str | None = None
    saved: str | None = None
    module: str | None = None
    rank: int | None = None
    dtype: torch.dtype | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        kind = "dense" if self.rank is None else "low-rank"
        if self.tensor is None and self.saved is None and self.module is None:
            kind = "unchanged"
        plain: dict[str, Any] = {"task": self.task, "kind": kind, "weight": self.weight}
        for key in ("tensor", "saved", "module", "rank"):
            if getattr(self, key) is not None:
                plain[key] = getattr(self, key)
        return plain


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: in the output.
        shape: in the output.
        dtype: in the output.
        rule: merge (by the method), mean (weighted mean of the deltas), base (copied), take (copied from one
            fine-tune), common_rows (mean over the rows that all have), identical (integers: all must agree),
            tied (written once, under another name), drop (left out because the recipe says so).
        why: where the rule comes from.
        sources: the fine-tunes that take part.
        in_base: whether the base has the tensor; without it the mean is one of values.
        options: of the method, as given for this tensor.
        scale: λ given for this tensor; None when it follows from the alignment or when no λ applies.
        aligned: whether it takes part in a(D), the alignment of the whole model.
        rank: of the merged update, None for a dense one.
        seed: of whatever is random.
        slices: number of matrices of a stack that is merged matrix by matrix, None otherwise.
        rows: rows that all models have, for common_rows.
        tied_to: the name under which a tied tensor is written.
        module: the adapter module it belongs to, for an adapter as output.
        flops: estimate.
        peak_bytes: estimate of the memory this tensor alone needs.
        notes: facts worth knowing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: Rule
    why: str
    sources: tuple[Source, ...] = ()
    in_base: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None
    aligned: bool = False
    rank: int | None = None
    seed: int = 0
    slices: int | None = None
    rows: int | None = None
    tied_to: str | None = None
    module: str | None = None
    flops: float = 0.0
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def written(self) -> bool:
        """Whether the output holds it under its own name."""
        return self.rule not in ("tied", "drop")

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        return self.numel * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        plain = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rule": self.rule,
            "why": self.why,
            "sources": [source.to_dict() for source in self.sources],
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
        }
        if self.rule == "merge":
            plain |= {"options": dict(self.options), "rank": self.rank, "seed": self.seed}
        for key in ("scale", "slices", "rows", "tied_to", "module"):
            if getattr(self, key) is not None:
                plain[key] = getattr(self, key)
        if self.notes:
            plain["notes"] = list(self.notes)
        return plain


@dataclass(frozen=True)
class ScalePlan:
    """How λ is found: a raw value per tensor, or an alignment target per model or per parameter."""

    value: Setting | None
    alignment: float | None
    per: Literal["model", "parameter"]
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        value = None if self.value is None else self.value.to_plain()
        return {"scale": value, "alignment": self.alignment, "per": self.per, "origin": self.origin}

    def describe(self) -> str:
        """Return one phrase for a table."""
        if self.alignment is not None:
            return f"λ from alignment {self.alignment:g} per {self.per} ({self.origin})"
        constant = None if self.value is None else self.value.constant
        return f"λ = {constant if constant is not None else 'per tensor'} ({self.origin})"


@dataclass
class Input:
    """One opened input.

    Attributes:
        label: as the recipe names it.
        kind: for tables.
        checkpoint: its full weights, None for an adapter on the base itself.
        adapter: its adapter, if it has one.
        tensors: base tensor name → name in the checkpoint.
        modules: base tensor name → adapted module.
        saved: base tensor name → name of the full tensor in the adapter.
        tied: name in the checkpoint → name of the tensor that it equals.
    """

    label: str
    kind: str
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None
    tensors: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The weight files it is read from."""
        files = list(self.checkpoint.files) if self.checkpoint is not None else []
        return files + (list(self.adapter.files) if self.adapter is not None else [])

    @property
    def places(self) -> list[Path]:
        """The files and folders that must outlive the merge."""
        folders = [item.path for item in (self.checkpoint, self.adapter) if item is not None]
        return [folder for folder in folders if folder is not None] + self.files

    @property
    def adapter_only(self) -> bool:
        """Whether it is an adapter without weights of its own."""
        return self.checkpoint is None and self.adapter is not None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        return {"source": self.label, "kind": self.kind, "files": [path.name for path in self.files]}


@dataclass
class Plan:
    """A merge, decided but not begun.

    Attributes:
        recipe: what was asked for.
        method: the registered method.
        output: a model, or an adapter.
        base: the base model; None for an adapter made from adapters alone.
        tasks: the fine-tunes in the recipe's order.
        tensors: every tensor of the output, and every tensor that is left out.
        scale: how λ is found.
        notes: facts about the whole merge.
    """

    recipe: Recipe
    method: Method
    output: Literal["model", "adapter"]
    base: Input | None
    tasks: list[Input]
    tensors: list[TensorPlan]
    scale: ScalePlan
    notes: list[str] = field(default_factory=list)

    @property
    def adapters(self) -> bool:
        """Whether every fine-tune is an adapter on the base."""
        return all(task.adapter_only for task in self.tasks)

    @property
    def inputs(self) -> list[Input]:
        """All inputs, the base first."""
        return [*([self.base] if self.base is not None else []), *self.tasks]

    @property
    def protected(self) -> list[Path]:
        """The files and folders that the output must not replace: the inputs and the recipe."""
        return [path for item in self.inputs for path in item.places] + self.recipe.files

    @property
    def written(self) -> list[TensorPlan]:
        """The tensors of the output."""
        return [tensor for tensor in self.tensors if tensor.written]

    def bytes_of(self, tensor: TensorPlan) -> int:
        """Return the size of a tensor in the output: an adapter holds two factors of it."""
        if self.output == "adapter" and tensor.module is not None and tensor.rank is not None:
            return tensor.rank * sum(tensor.shape) * tensor.dtype.itemsize
        return tensor.nbytes

    def totals(self) -> dict[str, Any]:
        """Return numbers for the whole plan: tensors by rule, output bytes, FLOPs, peak memory."""
        return {
            "tensors": dict(Counter(tensor.rule for tensor in self.tensors)),
            "parameters": sum(self.bytes_of(tensor) // tensor.dtype.itemsize for tensor in self.written),
            "output_bytes": sum(self.bytes_of(tensor) for tensor in self.written),
            "flops": sum(tensor.flops for tensor in self.tensors),
            "peak_bytes": max((tensor.peak_bytes for tensor in self.tensors), default=0),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data (JSON)."""
        return {
            "method": self.method.name,
            "output": self.output,
            "base": None if self.base is None else self.base.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "scale": self.scale.to_dict(),
            "totals": self.totals(),
            "notes": self.notes,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    def close(self) -> None:
        """Close the inputs."""
        for item in self.inputs:
            if item.checkpoint is not None:
                item.checkpoint.close()
