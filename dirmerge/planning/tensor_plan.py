"""The plan of one tensor as plain data: its inputs, rule and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

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

    @property
    def kind(self) -> str:
        """How it changes the tensor: dense, low-rank, or unchanged."""
        if self.tensor is None and self.saved is None and self.module is None:
            return "unchanged"
        return "dense" if self.rank is None else "low-rank"

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON)."""
        plain: dict[str, Any] = {"task": self.task, "kind": self.kind, "weight": self.weight}
        for key in ("tensor", "saved", "module", "rank"):
            if getattr(self, key) is not None:
                plain[key] = getattr(self, key)
        if self.dtype is not None:
            plain["dtype"] = dtype_name(self.dtype)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Source:
        """Returns the source that `to_dict` gave as plain data."""
        values = {key: value for key, value in plain.items() if key not in ("kind", "dtype")}
        return cls(**values, dtype=dtype_of(plain["dtype"]) if "dtype" in plain else None)


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
        """Returns it as plain data (JSON)."""
        plain = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "rule": self.rule,
            "why": self.why,
            "sources": [source.to_dict() for source in self.sources],
            "in_base": self.in_base,
            "options": dict(self.options),
            "aligned": self.aligned,
            "rank": self.rank,
            "seed": self.seed,
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
        }
        for key in ("scale", "slices", "rows", "tied_to", "module"):
            if getattr(self, key) is not None:
                plain[key] = getattr(self, key)
        if self.notes:
            plain["notes"] = list(self.notes)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TensorPlan:
        """Returns the tensor that `to_dict` gave as plain data."""
        changed = {
            "shape": tuple(plain["shape"]),
            "dtype": dtype_of(plain["dtype"]),
            "sources": tuple(Source.from_dict(source) for source in plain["sources"]),
            "notes": tuple(plain.get("notes", ())),
        }
        return cls(**{**plain, **changed})


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name without the module."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of a name without the module; ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must name a torch dtype, got {name!r}")
    return dtype
