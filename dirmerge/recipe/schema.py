"""The recipe: mergekit's YAML schema and our keys as pydantic models."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from dirmerge.recipe.align import AlignSection
from dirmerge.recipe.settings import (
    DTYPES,
    DTypeName,
    Globs,
    ModelRef,
    ModelSource,
    ParameterSetting,
    PositiveFloat,
    Scalar,
    Setting,
    SizeInBytes,
    TakeModel,
)

RuleName = Literal["merge", "mean", "base", "take", "common_rows", "present", "drop"]

# Keys of `parameters` that the engine reads itself; every other key is an option of the merge method.
ENGINE_PARAMETERS = ("weight", "scale", "lambda", "alignment", "alignment_per")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ModelEntry(_Strict):
    """One fine-tune and its own parameters."""

    model: ModelSource
    parameters: dict[str, ParameterSetting] = Field(default_factory=dict)


class TokenizerEntry(_Strict):
    """Whose tokenizer files the output gets."""

    source: str = "base"


class TensorRule(_Strict):
    """What becomes of the tensors whose names match a glob; the first rule that matches wins."""

    match: Globs
    rule: RuleName
    model: TakeModel | None = None

    def matches(self, name: str) -> bool:
        """Returns whether one of the globs matches `name`."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.match)


class Recipe(_Strict):
    """A merge: the base, the fine-tunes, the method and its parameters.

    `dtype` is the dtype of the output when `out_dtype` is not given, as in mergekit; arithmetic is always
    float32 (float64 for float64 models). `align` holds the unlabelled data of `dirmerge align`; a plain merge
    leaves it alone.
    """

    merge_method: str
    base_model: ModelSource | None = None
    models: tuple[ModelEntry, ...]
    parameters: dict[str, ParameterSetting] = Field(default_factory=dict)
    scale: ParameterSetting | None = None
    alignment: PositiveFloat | None = None
    alignment_per: Literal["model", "parameter"] = "model"
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = None
    tensors: tuple[TensorRule, ...] = ()
    shard_size: SizeInBytes = 5 * 10**9
    seed: Annotated[int, Field(ge=0)] = 0
    adapter_rank: Annotated[int, Field(ge=1)] | None = None
    align: AlignSection | None = None

    _plain: dict[str, Any] = PrivateAttr(default_factory=dict)
    _origin: str = PrivateAttr(default="recipe")
    _file: Path | None = PrivateAttr(default=None)
    _tasks: list[ModelEntry] | None = PrivateAttr(default=None)

    @property
    def origin(self) -> str:
        """The file it was read from, for messages."""
        return self._origin

    @property
    def files(self) -> list[Path]:
        """The local files and folders that it names: itself, models, templates, data, heads."""
        named = [self.chat_template]
        for reference in [self.base_model, *(entry.model for entry in self.models)]:
            if reference is not None and isinstance(reference.source, str):
                named += [reference.source, reference.adapter]
        for task in self.align.tasks if self.align is not None else ():
            named += [str(task.data), None if task.head is None else str(task.head)]
        paths = [Path(name).expanduser() for name in named if name and not is_inline_template(name)]
        return [path for path in ([self._file] if self._file else []) + paths if path.exists()]

    @property
    def method(self) -> str:
        """Our name of the merge method."""
        return "average" if self.merge_method == "linear" else self.merge_method

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of floating tensors in the output, None for the base's own."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    @property
    def tokenizer_from(self) -> str:
        """`base`, or a model as `models` lists it."""
        return self.tokenizer_source or (self.tokenizer.source if self.tokenizer else "base")

    @property
    def base(self) -> ModelRef | None:
        """The base model; for mergekit's `linear`, which needs none, the first model (any gives the same)."""
        if self.base_model is None and self.merge_method == "linear":
            return self.models[0].model
        return self.base_model

    def with_shard_size(self, size: int) -> Recipe:
        """Returns the recipe with another size of the weight files, in bytes."""
        changed = self.model_copy(update={"shard_size": size})
        changed._plain = {**self._plain, "shard_size": size}
        return changed

    def tasks(self) -> list[ModelEntry]:
        """Returns the fine-tunes: the listed models without the base, which only averages count."""
        if self._tasks is None:  # asked for once per tensor, and comparing references looks at the disk
            is_task = (self.method == "average" or not e.model.same_as(self.base_model) for e in self.models)
            self._tasks = [entry for entry, chosen in zip(self.models, is_task, strict=True) if chosen]
        return self._tasks

    def weights(self, name: str, depth: float) -> list[float]:
        """Returns the weight of every task for the tensor `name`."""
        weights = []
        for entry in self.tasks():
            value = None
            for parameters in (entry.parameters, self.parameters):
                if value is None and "weight" in parameters:
                    value = parameters["weight"].at(name, depth)
            weights.append(1.0 if value is None else float(value))
        return weights

    def present(self) -> int:
        """Returns the number of tasks whose weight is not 0 everywhere."""
        settings = [e.parameters.get("weight", self.parameters.get("weight")) for e in self.tasks()]
        return sum(setting is None or any(value != 0 for value in setting.values()) for setting in settings)

    def options(self, name: str, depth: float) -> dict[str, Scalar]:
        """Returns the method's options given for the tensor `name`; what is not given keeps its default."""
        # Options inside models are the same for all of them (_task_parameter_problems): the first has them.
        shared = {**self.parameters, **self.tasks()[0].parameters}
        options = {}
        for key, setting in shared.items():
            if key not in ENGINE_PARAMETERS and key != "normalize":
                value = setting.at(name, depth)
                if value is not None:
                    options[key] = value
        return options

    def filters(self) -> list[tuple[str, str]]:
        """Returns every (parameter path, filter) of the recipe."""
        found = [(f"parameters.{key}", f) for key, s in self.parameters.items() for f in s.filters()]
        for i, entry in enumerate(self.models):
            for key, setting in entry.parameters.items():
                found += [(f"models[{i}].parameters.{key}", pattern) for pattern in setting.filters()]
        if self.scale is not None:
            found += [("scale", pattern) for pattern in self.scale.filters()]
        return found

    def to_plain(self) -> dict[str, Any]:
        """Returns the recipe as it was given, with state dicts named instead of printed."""
        plain = _plain_value(self._plain)
        assert isinstance(plain, dict)
        return plain


def _plain_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value and all(isinstance(item, torch.Tensor) for item in value.values()):
            return "<state dict>"
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, ModelRef):
        return value.label
    if isinstance(value, Setting):
        return value.to_plain()
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    if isinstance(value, Path | torch.dtype):
        return str(value).removeprefix("torch.")
    return value


def is_inline_template(template: str) -> bool:
    """Returns whether the string is itself a Jinja template and not the name of a file."""
    return "{{" in template or "{%" in template
