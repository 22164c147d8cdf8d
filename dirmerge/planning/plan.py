"""The plan of a merge as plain data: every input, every output tensor, and how λ is found."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dirmerge.errors import MismatchError
from dirmerge.methods import Method, get_method
from dirmerge.planning.input_plan import InputPlan
from dirmerge.planning.inputs import Inputs, reopen_inputs
from dirmerge.planning.tensor_plan import TensorPlan, dtype_name, dtype_of
from dirmerge.recipe import Setting, parse_setting


@dataclass(frozen=True)
class ScalePlan:
    """How λ is found: a raw value per tensor, or an alignment target per model or per parameter."""

    value: Setting | None
    alignment: float | None
    per: Literal["model", "parameter"]
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON)."""
        value = None if self.value is None else self.value.to_plain()
        return {"scale": value, "alignment": self.alignment, "per": self.per, "origin": self.origin}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalePlan:
        """Returns the scale that `to_dict` gave as plain data."""
        value = None if plain["scale"] is None else parse_setting(plain["scale"])
        return cls(value, plain["alignment"], plain["per"], plain["origin"])

    def describe(self) -> str:
        """Returns one phrase for a table."""
        if self.alignment is not None:
            return f"λ from alignment {self.alignment:g} per {self.per} ({self.origin})"
        constant = None if self.value is None else self.value.constant
        return f"λ = {constant if constant is not None else 'per tensor'} ({self.origin})"


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
        """Returns the size of a tensor in the output: an adapter holds two factors of it."""
        if self.output == "adapter" and tensor.module is not None and tensor.rank is not None:
            return tensor.rank * sum(tensor.shape) * tensor.dtype.itemsize
        return tensor.nbytes

    def totals(self) -> dict[str, Any]:
        """Returns numbers for the whole plan: tensors by rule, output bytes, FLOPs, peak memory."""
        return {
            "tensors": dict(Counter(tensor.rule for tensor in self.tensors)),
            "parameters": sum(self.bytes_of(tensor) // tensor.dtype.itemsize for tensor in self.written),
            "output_bytes": sum(self.bytes_of(tensor) for tensor in self.written),
            "flops": sum(tensor.flops for tensor in self.tensors),
            "peak_bytes": max((tensor.peak_bytes for tensor in self.tensors), default=0),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data (JSON), from which `from_dict` makes an equal plan."""
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
        """Returns the plan that `to_dict` gave as plain data."""
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
            dtype=None if plain["dtype"] is None else dtype_of(plain["dtype"]),
            shard_size=plain["shard_size"],
            tokenizer=plain["tokenizer"],
            chat_template=plain["chat_template"],
            base_name=plain["base_name"],
            notes=list(plain["notes"]),
        )

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all that decides the output: version, recipe, headers and sizes, tensors.

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
        """Returns the live inputs: those that `make_plan` has left open, or the files opened again.

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
        """Closes the inputs."""
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
