"""The plan of a merge as plain data: every output tensor with its inputs, rule and cost."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dirmerge.errors import MismatchError
from dirmerge.methods import Method, get_method
from dirmerge.planning.inputs import Input, Inputs, Place, reopen_inputs
from dirmerge.recipe import Setting, parse_setting

CHUNK_BYTES = 8 << 20
"""Rows are read, made and written in chunks of about this size in float32: a few fit a CPU's cache."""

WHOLE_BYTES = 128 << 20
"""A method that needs whole tensors before it can make a row reads all of them at once up to this size, and
beyond it one fine-tune at a time, and all once more by rows."""

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
        """Return it as plain data (JSON)."""
        plain: dict[str, Any] = {"task": self.task, "kind": self.kind, "weight": self.weight}
        for key in ("tensor", "saved", "module", "rank"):
            if getattr(self, key) is not None:
                plain[key] = getattr(self, key)
        if self.dtype is not None:
            plain["dtype"] = dtype_name(self.dtype)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Source:
        """Return the source that `to_dict` gave as plain data."""
        values = {key: value for key, value in plain.items() if key not in ("kind", "dtype")}
        return cls(**values, dtype=_dtype(plain["dtype"]) if "dtype" in plain else None)


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
        """Return the tensor that `to_dict` gave as plain data."""
        changed = {
            "shape": tuple(plain["shape"]),
            "dtype": _dtype(plain["dtype"]),
            "sources": tuple(Source.from_dict(source) for source in plain["sources"]),
            "notes": tuple(plain.get("notes", ())),
        }
        return cls(**{**plain, **changed})


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

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalePlan:
        """Return the scale that `to_dict` gave as plain data."""
        value = None if plain["scale"] is None else parse_setting(plain["scale"])
        return cls(value, plain["alignment"], plain["per"], plain["origin"])

    def describe(self) -> str:
        """Return one phrase for a table."""
        if self.alignment is not None:
            return f"λ from alignment {self.alignment:g} per {self.per} ({self.origin})"
        constant = None if self.value is None else self.value.constant
        return f"λ = {constant if constant is not None else 'per tensor'} ({self.origin})"


@dataclass(frozen=True)
class FilePlan:
    """A weight file as it was when the merge was planned.

    Attributes:
        path: of the file.
        size: in bytes.
        header: SHA-256 of its tensors' names, dtypes, shapes and places.
    """

    path: str
    size: int
    header: str


@dataclass(frozen=True)
class InputPlan(Place):
    """An input: where it is, and the weight files it is read from.

    Attributes:
        files: the weight files.
        base_name: what an adapter calls its base model.
    """

    files: tuple[FilePlan, ...] = ()
    base_name: str | None = None

    @classmethod
    def of(cls, item: Input) -> InputPlan:
        """Return the plain data of an opened input."""
        digests: dict[Path, Any] = {}
        for info in item.infos():
            if info.file is not None:
                text = f"{info.name}\0{info.dtype}\0{info.shape}\0{info.offset}\n"
                digests.setdefault(info.file, hashlib.sha256()).update(text.encode())
        files = tuple(
            FilePlan(str(path), path.stat().st_size, digests[path].hexdigest() if path in digests else "")
            for path in item.files
        )
        base_name = item.adapter.base_name if item.adapter is not None else None
        place = item.place
        return cls(place.label, place.kind, place.checkpoint, place.adapter, files, base_name)

    @property
    def adapter_only(self) -> bool:
        """Whether it is an adapter without weights of its own."""
        return self.kind == "adapter"

    @property
    def paths(self) -> list[Path]:
        """The files and folders that must outlive the merge."""
        places = [place for place in (self.checkpoint, self.adapter) if place is not None]
        return [Path(place) for place in places] + [Path(file.path) for file in self.files]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data (JSON)."""
        plain = asdict(self)
        return {"source": plain.pop("label"), **plain}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> InputPlan:
        """Return the input that `to_dict` gave as plain data."""
        files = tuple(FilePlan(**file) for file in plain["files"])
        kept = {key: value for key, value in plain.items() if key not in ("source", "files")}
        return cls(label=plain["source"], files=files, **kept)


@dataclass
class Plan:
    """A merge, decided and not begun: plain data, but for the inputs that `make_plan` leaves open.

    Attributes:
        version: of dirmerge.
        method_name: name of the registered method.
        output: a model, or an adapter.
        recipe: as the user gave it, state dicts named instead of printed.
        origin: where the recipe comes from, for messages.
        recipe_files: local files and folders that the recipe is made of and names.
        base: the base model; None for an adapter made from adapters alone.
        tasks: the fine-tunes in the recipe's order.
        tensors: every tensor of the output, and every tensor that is left out.
        scale: how λ is found.
        seed: of the recipe.
        dtype: of floating tensors in the output, None for each tensor's own.
        shard_size: bytes of a weight file.
        tokenizer: whose tokenizer the output gets: `base`, or an input's label.
        chat_template: `auto`, a Jinja template or the path of one; None for the tokenizer's own.
        base_name: what the recipe calls the base model.
        notes: facts about the whole merge.
    """

    version: str
    method_name: str
    output: Literal["model", "adapter"]
    recipe: dict[str, Any]
    origin: str
    recipe_files: list[str]
    base: InputPlan | None
    tasks: list[InputPlan]
    tensors: list[TensorPlan]
    scale: ScalePlan
    seed: int = 0
    dtype: torch.dtype | None = None
    shard_size: int = 5 * 10**9
    tokenizer: str = "base"
    chat_template: str | None = None
    base_name: str | None = None
    notes: list[str] = field(default_factory=list)
    _inputs: Inputs | None = field(default=None, repr=False, compare=False)

    @property
    def method(self) -> Method:
        """The registered method."""
        return get_method(self.method_name)

    @property
    def adapters(self) -> bool:
        """Whether every fine-tune is an adapter on the base."""
        return all(task.adapter_only for task in self.tasks)

    @property
    def inputs(self) -> list[InputPlan]:
        """All inputs, the base first."""
        return [*([self.base] if self.base is not None else []), *self.tasks]

    @property
    def protected(self) -> list[Path]:
        """The files and folders that the output must not replace: the inputs and the recipe."""
        return [path for item in self.inputs for path in item.paths] + [Path(p) for p in self.recipe_files]

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
        """Return the plan as plain data (JSON), from which `from_dict` makes an equal plan."""
        return {
            "dirmerge": self.version,
            "method": self.method_name,
            "output": self.output,
            "base": None if self.base is None else self.base.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "scale": self.scale.to_dict(),
            "seed": self.seed,
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "shard_size": self.shard_size,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "base_name": self.base_name,
            "totals": self.totals(),
            "notes": list(self.notes),
            "recipe": self.recipe,
            "origin": self.origin,
            "recipe_files": list(self.recipe_files),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_dict` gave as plain data."""
        return cls(
            version=plain["dirmerge"],
            method_name=plain["method"],
            output=plain["output"],
            recipe=dict(plain["recipe"]),
            origin=plain["origin"],
            recipe_files=list(plain["recipe_files"]),
            base=None if plain["base"] is None else InputPlan.from_dict(plain["base"]),
            tasks=[InputPlan.from_dict(task) for task in plain["tasks"]],
            tensors=[TensorPlan.from_dict(tensor) for tensor in plain["tensors"]],
            scale=ScalePlan.from_dict(plain["scale"]),
            seed=plain["seed"],
            dtype=None if plain["dtype"] is None else _dtype(plain["dtype"]),
            shard_size=plain["shard_size"],
            tokenizer=plain["tokenizer"],
            chat_template=plain["chat_template"],
            base_name=plain["base_name"],
            notes=list(plain["notes"]),
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of all that decides the output: version, recipe, headers and sizes, tensors.

        Where the files lie enters only as far as the recipe says it.
        """
        plain = self.to_dict()
        for key in ("origin", "recipe_files", "notes", "totals"):
            del plain[key]
        for item in [*([plain["base"]] if plain["base"] else []), *plain["tasks"]]:
            item["files"] = [
                (Path(file["path"]).name, file["size"], file["header"]) for file in item["files"]
            ]
            for key in ("checkpoint", "adapter", "source"):
                del item[key]
        text = json.dumps(plain, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def open(self) -> Inputs:
        """Return the live inputs: those that `make_plan` has left open, or the files opened again.

        Raises:
            CheckpointError: an input that cannot be read any more.
            MismatchError: a file is not as it was when the merge was planned.
            ValueError: the plan comes from data, and an input is a state dict.
        """
        if self._inputs is not None:
            return self._inputs
        inputs = reopen_inputs(self.base, self.tasks)
        for planned, item in zip(self.inputs, inputs.all, strict=True):
            for file, now in zip(planned.files, InputPlan.of(item).files, strict=True):
                if file != now:
                    inputs.close()
                    raise MismatchError(
                        f"{file.path}: has changed since the merge was planned; plan it again"
                    )
        self._inputs = inputs
        return inputs

    def close(self) -> None:
        """Close the inputs."""
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must name a torch dtype, got {name!r}")
    return dtype
