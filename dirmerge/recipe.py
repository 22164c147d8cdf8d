"""The recipe: mergekit's YAML schema and our keys as pydantic models; all that is wrong is listed at once."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
)

from dirmerge.alignment.config import AlignSection, AlignTask, LearnOptions
from dirmerge.errors import RecipeError

MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_NODES = 100_000

Scalar: TypeAlias = float | int | bool | str
RuleName = Literal["merge", "mean", "base", "take", "common_rows", "present", "drop"]

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Keys of `parameters` that the engine reads itself; every other key is an option of the merge method.
ENGINE_PARAMETERS = ("weight", "scale", "lambda", "alignment", "alignment_per")

# fmt: off
_MERGEKIT_ONLY_METHODS = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "core_space", "dare_linear", "dare_ties", "della",
    "della_linear", "karcher", "model_breadcrumbs", "model_stock", "multislerp", "nearswap", "nuslerp",
    "passthrough", "ram", "ramplus_tl", "sce", "slerp",
})
# fmt: on

# mergekit's names for options, with the values under which the two programs compute the same thing.
_NORMALIZE_EQUIVALENT = {"linear": True, "average": True, "ties": True, "task_arithmetic": False}

_UNSUPPORTED_KEYS = {
    "slices": (
        "dirmerge merges whole models by tensor name and does not reorder or stack layers; list the models "
        "under `models:`, and use `tensors:` rules or parameter filters to treat single layers differently"
    ),
    "modules": (
        "dirmerge merges every module of a model in one go; list the models under `models:`, and use "
        "`tensors:` rules to treat a module's tensors differently"
    ),
    "tokenizer.tokens": (
        "dirmerge does not build token embeddings; prepare the models with one vocabulary first, or use a "
        "`tensors:` rule `common_rows` for the embedding"
    ),
    "tokenizer.pad_to_multiple_of": (
        "dirmerge keeps the base's embedding shape; remove the key and resize the merged model with "
        "transformers' `resize_token_embeddings(n, pad_to_multiple_of=…)`"
    ),
}


@dataclass(frozen=True)
class Setting:
    """A parameter's value: (filter, value) cases, the first whose filter is part of the tensor's name wins.

    A value is a number, a string, a bool, or a tuple of numbers, which is interpolated over the layers.
    """

    cases: tuple[tuple[str | None, Scalar | tuple[float, ...]], ...]

    def at(self, name: str, depth: float = 0.0) -> Scalar | None:
        """Return the value for the tensor `name` at relative `depth` in [0, 1], None if no case matches."""
        for pattern, value in self.cases:
            if pattern is None or pattern == "*" or pattern in name:
                return _interpolate(value, depth) if isinstance(value, tuple) else value
        return None

    @property
    def constant(self) -> Scalar | None:
        """The one value it has for every tensor, or None when it varies."""
        pattern, value = self.cases[0]
        return None if isinstance(value, tuple) or pattern not in (None, "*") else value

    def filters(self) -> Iterator[str]:
        """Yield the filters that name something."""
        return (pattern for pattern, _ in self.cases if pattern not in (None, "*"))

    def values(self) -> Iterator[Scalar]:
        """Yield every value of every case."""
        for _, value in self.cases:
            yield from value if isinstance(value, tuple) else (value,)

    @property
    def numeric(self) -> bool:
        """Whether all its values are numbers."""
        return not any(isinstance(value, bool | str) for value in self.values())

    def to_plain(self) -> Any:
        """Return the value as YAML would hold it."""
        if len(self.cases) == 1 and self.cases[0][0] is None:
            value = self.cases[0][1]
            return list(value) if isinstance(value, tuple) else value
        plain = []
        for pattern, value in self.cases:
            item: dict[str, Any] = {"value": list(value) if isinstance(value, tuple) else value}
            if pattern is not None:
                item["filter"] = pattern
            plain.append(item)
        return plain


def _interpolate(values: tuple[float, ...], depth: float) -> float:
    position = min(max(depth, 0.0), 1.0) * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def _parse_scalar(value: object) -> Scalar:
    if isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"must be finite, got {value}")
        return value
    raise ValueError(f"must be a number, a string, true or false, got {_describe(value)}")


def _parse_scalar_or_gradient(value: object) -> Scalar | tuple[float, ...]:
    if not isinstance(value, list | tuple):
        return _parse_scalar(value)
    if not value:
        raise ValueError("must not be an empty list")
    numbers = []
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise ValueError(f"a list over the layers holds numbers, got {_describe(item)}")
        numbers.append(float(item))
    return tuple(numbers)


def _parse_setting(value: object) -> Setting:
    if isinstance(value, Setting):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        cases: list[tuple[str | None, Scalar | tuple[float, ...]]] = []
        for item in value:
            if not isinstance(item, Mapping):
                raise ValueError("mixes {value, filter} items with plain values; give every item a `value:`")
            unknown = [str(key) for key in item if key not in ("value", "filter")]
            if unknown:
                raise ValueError(
                    "an item has `value` and `filter`, got " + ", ".join(repr(key) for key in unknown)
                )
            if "value" not in item:
                raise ValueError("an item needs a `value`")
            pattern = item.get("filter")
            if pattern is not None and not isinstance(pattern, str):
                raise ValueError(f"`filter` must be a part of a tensor's name, got {_describe(pattern)}")
            if cases and cases[-1][0] in (None, "*"):
                raise ValueError("an item without filter matches everything: it must be the last one")
            cases.append((pattern, _parse_scalar_or_gradient(item["value"])))
        return Setting(tuple(cases))
    return Setting(((None, _parse_scalar_or_gradient(value)),))


ParameterSetting = Annotated[Setting, PlainValidator(_parse_setting)]


@dataclass(frozen=True, eq=False)
class ModelRef:
    """One input: `path`, `path@revision`, `path+adapter`, an adapter's folder, or a state dict in memory."""

    source: str | Mapping[str, torch.Tensor]
    adapter: str | None = None

    @property
    def label(self) -> str:
        """The reference as the recipe writes it."""
        if not isinstance(self.source, str):
            return "<state dict>"
        return self.source if self.adapter is None else f"{self.source}+{self.adapter}"

    def same_as(self, other: ModelRef | None) -> bool:
        """Whether both name the same input."""
        if other is None or self.adapter != other.adapter:
            return False
        if isinstance(self.source, str) and isinstance(other.source, str):
            return self.source == other.source or _same_folder(self.source, other.source)
        return self.source is other.source


def _same_folder(left: str, right: str) -> bool:
    a, b = Path(left).expanduser(), Path(right).expanduser()
    return a.exists() and b.exists() and a.resolve() == b.resolve()


def _parse_model(value: object) -> ModelRef:
    if isinstance(value, ModelRef):
        return value
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("must name a folder, a file or a hub id, got an empty string")
        if "+" not in value or Path(value).expanduser().exists():
            return ModelRef(value)
        # A folder's name may itself hold a plus: prefer the split whose left side is there.
        cuts = [i for i, char in enumerate(value) if char == "+"]
        cut = next((i for i in cuts if Path(value[:i]).expanduser().exists()), cuts[0])
        model, adapter = value[:cut].strip(), value[cut + 1 :].strip()
        if not model or not adapter:
            raise ValueError(f"`path+adapter` needs both parts, got {value!r}")
        return ModelRef(model, adapter)
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("is an empty state dict")
        if all(isinstance(key, str) and isinstance(item, torch.Tensor) for key, item in value.items()):
            return ModelRef(value)
        raise ValueError("must be a string `path[@revision][+adapter]` or a state dict of tensors")
    raise ValueError(f"must be a string `path[@revision][+adapter]` or a state dict, got {_describe(value)}")


ModelSource = Annotated[ModelRef, PlainValidator(_parse_model)]


def _parse_dtype(value: object) -> str:
    name = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    if name not in DTYPES:
        raise ValueError(f"must be one of {', '.join(DTYPES)}, got {_describe(value)}")
    return name


DTypeName = Annotated[str, PlainValidator(_parse_dtype)]

_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(value: object) -> int:
    """Return a size such as 5GB, 500MB, 2GiB or a plain number in bytes.

    Raises:
        ValueError: not a positive size.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = _SIZE_UNITS.get((match[2] or "B").upper()) if match else None
        if match and unit is not None and float(match[1]) * unit >= 1:
            return int(float(match[1]) * unit)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"must be a size such as 5GB, 500MB or 2GiB, got {_describe(value)}")


SizeInBytes = Annotated[int, PlainValidator(parse_size)]


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"must be positive and finite, got {value}")
    return value


PositiveFloat = Annotated[float, AfterValidator(_positive)]


def _parse_globs(value: object) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if (
        isinstance(patterns, Sequence)
        and patterns
        and all(isinstance(pattern, str) and pattern for pattern in patterns)
    ):
        return tuple(patterns)
    raise ValueError(f"must be a glob on tensor names or a list of globs, got {_describe(value)}")


Globs = Annotated[tuple[str, ...], PlainValidator(_parse_globs)]


def _parse_take_model(value: object) -> int | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"must be a model as `models` lists it, or its number from 0, got {_describe(value)}")


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
    model: Annotated[int | str, PlainValidator(_parse_take_model)] | None = None

    def matches(self, name: str) -> bool:
        """Whether one of the globs matches `name`."""
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

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """Return the recipe in a YAML file, in YAML text (a string of several lines) or in a dict.

        Raises:
            RecipeError: unreadable, not YAML, or invalid; the message lists everything that is wrong with it.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._from_plain(dict(source), "recipe")
        if isinstance(source, str) and "\n" in source:
            return cls._from_plain(_parse_yaml(source.encode(), "recipe"), "recipe")
        path = Path(source).expanduser()
        try:
            with path.open("rb") as file:
                content = file.read(MAX_RECIPE_BYTES + 1)
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
        recipe = cls._from_plain(_parse_yaml(content, str(path)), str(path))
        recipe._file = path
        return recipe

    @classmethod
    def _from_plain(cls, plain: dict[str, Any], origin: str) -> Recipe:
        problems = _unsupported(plain)
        known = {key: value for key, value in plain.items() if key not in ("slices", "modules")}
        if isinstance(known.get("tokenizer"), Mapping):
            known["tokenizer"] = {
                key: value
                for key, value in known["tokenizer"].items()
                if f"tokenizer.{key}" not in _UNSUPPORTED_KEYS
            }
        if problems and "models" not in known:
            known["models"] = []  # slices stand in for models: one complaint is enough
        problems += _parameter_problems(known)
        fields, scale_problems = _lift_scale(known)
        problems += scale_problems
        recipe = None
        try:
            recipe = cls.model_validate(fields)
        except ValidationError as error:
            problems += _translate(error)
        if recipe is not None:
            problems += recipe._problems(complete=not problems)
        if problems or recipe is None:
            raise RecipeError(_list_problems(origin, problems))
        recipe._plain = plain
        recipe._origin = origin
        return recipe

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
        """Return the recipe with another size of the weight files, in bytes."""
        changed = self.model_copy(update={"shard_size": size})
        changed._plain = {**self._plain, "shard_size": size}
        return changed

    def tasks(self) -> list[ModelEntry]:
        """Return the fine-tunes: the listed models without the base, which only averages count."""
        if self.method == "average":
            return list(self.models)
        return [entry for entry in self.models if not entry.model.same_as(self.base_model)]

    def weights(self, name: str, depth: float) -> list[float]:
        """Return the weight of every task for the tensor `name`."""
        weights = []
        for entry in self.tasks():
            value = None
            for parameters in (entry.parameters, self.parameters):
                if value is None and "weight" in parameters:
                    value = parameters["weight"].at(name, depth)
            weights.append(1.0 if value is None else float(value))
        return weights

    def present(self) -> int:
        """Return the number of tasks whose weight is not 0 everywhere."""
        settings = [e.parameters.get("weight", self.parameters.get("weight")) for e in self.tasks()]
        return sum(setting is None or any(value != 0 for value in setting.values()) for setting in settings)

    def options(self, name: str, depth: float) -> dict[str, Scalar]:
        """Return the method's options as given for the tensor `name`; what is not given keeps its default."""
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
        """Return every (parameter path, filter) of the recipe."""
        found = [(f"parameters.{key}", f) for key, s in self.parameters.items() for f in s.filters()]
        for i, entry in enumerate(self.models):
            for key, setting in entry.parameters.items():
                found += [(f"models[{i}].parameters.{key}", pattern) for pattern in setting.filters()]
        if self.scale is not None:
            found += [("scale", pattern) for pattern in self.scale.filters()]
        return found

    def to_plain(self) -> dict[str, Any]:
        """Return the recipe as it was given, with state dicts named instead of printed."""
        plain = _plain_value(self._plain)
        assert isinstance(plain, dict)
        return plain

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.to_plain(), sort_keys=False, allow_unicode=True, width=110)

    def _problems(self, *, complete: bool) -> list[str]:
        """Return what pydantic cannot see; `complete` is False when known problems explain an empty list."""
        problems = []
        if not self.models and complete:
            problems.append("models: list at least one model")
        elif self.models and not self.tasks():
            problems.append("models: lists only the base model; list at least one fine-tune")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            problems.append("tokenizer: give either `tokenizer_source` or `tokenizer`, not both")
        labels = [entry.model.label for entry in self.models]
        source = self.tokenizer_from
        if source == "union":
            problems.append(
                "tokenizer_source: a union of tokenizers needs new embedding rows, which dirmerge does not "
                "build; use `base` or a listed model, with a `tensors:` rule `common_rows` for the embedding"
            )
        elif source not in ("base", self.base_model and self.base_model.label, *labels):
            problems.append(
                f"tokenizer_source: must be `base` or a listed model, got {source!r}"
                + suggestion(source, labels)
            )
        if self.chat_template is not None:
            problems += _chat_template_problems(self.chat_template)
        for i, rule in enumerate(self.tensors):
            if (rule.rule == "take") != (rule.model is not None):
                problems.append(
                    f"tensors[{i}].model: `take` needs the model to take from"
                    if rule.rule == "take"
                    else f"tensors[{i}].model: only the rule `take` names a model, remove it or use `take`"
                )
            elif isinstance(rule.model, int) and rule.model >= len(self.models):
                problems.append(
                    f"tensors[{i}].model: must be less than {len(self.models)}, the number of models, "
                    f"got {rule.model}"
                )
            elif isinstance(rule.model, str) and rule.model not in labels:
                problems.append(
                    f"tensors[{i}].model: must be a listed model, got {rule.model!r}"
                    + suggestion(rule.model, labels)
                )
        if self.align is not None and complete:
            labels = [task.model.label for task in self.tasks()]
            problems += self.align.problems(labels, self.merge_method)
        problems += self._task_parameter_problems()
        problems += self._normalize_problems()
        if self.scale is not None and not self.scale.numeric:
            problems.append("scale: must be a number")
        return problems

    def _task_parameter_problems(self) -> list[str]:
        problems = []
        for i, entry in enumerate(self.models):
            if entry.parameters and not any(entry is task for task in self.tasks()):
                problems.append(f"models[{i}].parameters: the base has no delta, remove its parameters")
        tasks = self.tasks()
        for key in sorted({key for entry in tasks for key in entry.parameters} - {"weight"}):
            values = [entry.parameters.get(key) for entry in tasks]
            if any(value != values[0] for value in values):
                problems.append(
                    f"models[…].parameters.{key}: {self.merge_method} has one {key} for all models; give "
                    f"every model the same value, or set parameters.{key}"
                )
        for path, setting in self._weight_settings():
            if not setting.numeric:
                problems.append(f"{path}: must be a number")
        return problems

    def _weight_settings(self) -> Iterator[tuple[str, Setting]]:
        if "weight" in self.parameters:
            yield "parameters.weight", self.parameters["weight"]
        for i, entry in enumerate(self.models):
            if "weight" in entry.parameters:
                yield f"models[{i}].parameters.weight", entry.parameters["weight"]

    def _normalize_problems(self) -> list[str]:
        setting = self.parameters.get("normalize")
        if setting is None:
            return []
        wanted = _NORMALIZE_EQUIVALENT.get(self.merge_method)
        if wanted is not None and setting.constant is wanted:
            return []
        if wanted is None:
            return [f"parameters.normalize: {self.merge_method} has no such option, remove it"]
        return [f"parameters.normalize: must be {str(wanted).lower()} for {self.merge_method}, or left out"]


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


def _unsupported(plain: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key}: {_UNSUPPORTED_KEYS[key]}" for key in ("slices", "modules") if plain.get(key) is not None
    ]
    tokenizer = plain.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        for key in ("tokens", "pad_to_multiple_of"):
            if tokenizer.get(key) is not None:
                problems.append(f"tokenizer.{key}: {_UNSUPPORTED_KEYS[f'tokenizer.{key}']}")
    return problems


def _lift_scale(plain: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Move scale, lambda and alignment out of `parameters`; each may be given once."""
    fields = dict(plain)
    problems = []
    parameters = fields.get("parameters")
    if isinstance(parameters, Mapping):
        parameters = dict(parameters)
        for inner, outer in (
            ("scale", "scale"),
            ("lambda", "scale"),
            ("alignment", "alignment"),
            ("alignment_per", "alignment_per"),
        ):
            if inner in parameters:
                value = parameters.pop(inner)
                if outer in fields:
                    problems.append(f"parameters.{inner}: `{outer}` is given twice, remove one of them")
                else:
                    fields[outer] = value
        fields["parameters"] = parameters
    if fields.get("scale") is not None and fields.get("alignment") is not None:
        problems.append(
            "alignment: `scale` is the raw λ and `alignment` a target from which λ follows; give one of them"
        )
    if fields.get("scale") is not None and fields.get("alignment_per") is not None:
        problems.append("alignment_per: has no meaning beside `scale`, remove one of them")
    if fields.get("merge_method") == "linear":
        if any(fields.get(key) is not None for key in ("scale", "alignment", "alignment_per")):
            problems.append("merge_method: linear has no scale; use merge_method: average to set one")
        else:
            fields["scale"] = 1.0
    return {key: value for key, value in fields.items() if value is not None}, problems


def _parameter_problems(plain: Mapping[str, Any]) -> list[str]:
    """Return unknown methods and unknown parameter names, with suggestions."""
    from dirmerge.methods import METHODS, get_method  # here: reading a recipe's structure needs no method

    method = plain.get("merge_method")
    if not isinstance(method, str):
        return []
    ours = sorted(METHODS)
    if method in _MERGEKIT_ONLY_METHODS:
        return [f"merge_method: {method} is mergekit's own; dirmerge has {', '.join(ours)}, linear"]
    if method == "linear":
        known = {"weight", "normalize"}
    else:
        try:
            known = {*get_method(method).options, *ENGINE_PARAMETERS}
        except ValueError:
            text = f"merge_method: must be one of {', '.join(ours)}, got {method!r}"
            return [text + suggestion(method, ours)]
        if method in _NORMALIZE_EQUIVALENT:
            known.add("normalize")
    problems = []
    places: list[tuple[str, Any, set[str]]] = [("parameters", plain.get("parameters"), known)]
    models = plain.get("models")
    if isinstance(models, list | tuple):
        inner = known - {"scale", "lambda", "alignment", "alignment_per", "normalize"}
        for i, entry in enumerate(models):
            if isinstance(entry, Mapping):
                places.append((f"models[{i}].parameters", entry.get("parameters"), inner))
    for path, parameters, allowed in places:
        if not isinstance(parameters, Mapping):
            continue
        for key in parameters:
            if key == "int8_mask":
                problems.append(f"{path}.int8_mask: dirmerge stores no masks, remove it")
            elif key not in allowed and key in known:
                problems.append(f"{path}.{key}: is one for all models, move it to `parameters`")
            elif key not in allowed:
                text = f"{path}.{key}: {method} has no such parameter"
                problems.append(text + suggestion(str(key), sorted(allowed)))
    return problems


def _chat_template_problems(template: str) -> list[str]:
    if template == "auto" or is_inline_template(template) or Path(template).expanduser().is_file():
        return []
    text = (
        f"chat_template: must be `auto`, a Jinja template or the path of a file with one, got {template!r}; "
        "mergekit's built-in names are not known here: paste the template, or use `tokenizer_source`"
    )
    return [text]


def is_inline_template(template: str) -> bool:
    """Whether the string is itself a Jinja template and not the name of a file."""
    return "{{" in template or "{%" in template


class _Loader(yaml.SafeLoader):
    """SafeLoader which refuses duplicate keys and reads 1e-5 as the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(content: bytes, origin: str) -> dict[str, Any]:
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{origin}: is larger than {MAX_RECIPE_BYTES} bytes, which no recipe is")
    try:
        loader = _Loader(content.decode("utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                raise RecipeError(f"{origin}: is empty; a recipe has at least merge_method and models")
            _check_nodes(node, origin)
            plain = loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{origin}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise RecipeError(f"{origin}: is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{origin}: is not valid YAML: {_one_line(str(error))}") from error
    if not isinstance(plain, dict):
        raise RecipeError(f"{origin}: must be a mapping with merge_method and models, got {_describe(plain)}")
    return plain


def _check_nodes(root: yaml.Node, origin: str) -> None:
    """Refuse duplicate keys, and aliases that expand to more than a recipe can need."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    problems: list[str] = []

    def size(node: yaml.Node) -> int:
        key = id(node)
        if key in open_nodes:
            raise RecipeError(f"{origin}: an alias contains itself (line {node.start_mark.line + 1})")
        if key in sizes:
            return sizes[key]
        open_nodes.add(key)
        total = 1
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for name, value in node.value:
                if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                    if name.value in seen:
                        first, again = seen[name.value], name.start_mark.line + 1
                        problems.append(f"key {name.value!r} is given twice (lines {first} and {again})")
                    seen.setdefault(name.value, name.start_mark.line + 1)
                total += size(name) + size(value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(item) for item in node.value)
        open_nodes.discard(key)
        if total > MAX_RECIPE_NODES:
            raise RecipeError(
                f"{origin}: expands to more than {MAX_RECIPE_NODES} values; no recipe has so many"
            )
        sizes[key] = total
        return total

    size(root)
    if problems:
        raise RecipeError(_list_problems(origin, problems))


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_keys(location: Sequence[str | int]) -> list[str]:
    nested: dict[str, type[BaseModel]] = {
        "models": ModelEntry,
        "tokenizer": TokenizerEntry,
        "tensors": TensorRule,
    }
    model = nested.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    if location[0] == "align" and len(location) > 1:
        inner: dict[str, type[BaseModel]] = {"tasks": AlignTask, "learn": LearnOptions}
        model = inner.get(str(location[1]), AlignSection) if len(location) > 2 else AlignSection
    return [*model.model_fields]


def _path(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _translate(error: ValidationError) -> list[str]:
    problems = []
    for item in error.errors(include_url=False):
        location = [part for part in item["loc"] if not str(part).startswith("function-")]
        path = _path(location)
        match item["type"]:
            case "extra_forbidden":
                text = "unknown key" + suggestion(str(location[-1]), _known_keys(location))
            case "missing":
                text = "is missing"
            case "value_error":
                text = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
            case "literal_error":
                text = f"must be {item['ctx']['expected']}, got {_describe(item['input'])}"
                expected = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
                text += suggestion(str(item["input"]), expected)
            case _:
                text = f"{item['msg'][:1].lower()}{item['msg'][1:]}, got {_describe(item['input'])}"
        problems.append(f"{path}: {text}" if path else text)
    return problems


def _list_problems(origin: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{origin}: {problems[0]}"
    return f"{origin}: {len(problems)} problems:" + "".join(f"\n  {problem}" for problem in problems)


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str | int | float | bool):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "…"
    return f"a {type(value).__name__}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
