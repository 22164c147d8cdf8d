"""The values of a recipe: settings that vary by tensor, model references, sizes, dtypes, globs."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import AfterValidator, PlainValidator

Scalar: TypeAlias = float | int | bool | str

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Setting:
    """A parameter's value: (filter, value) cases, the first whose filter is part of the tensor's name wins.

    A value is a number, a string, a bool, or a tuple of numbers, which is interpolated over the layers.
    """

    cases: tuple[tuple[str | None, Scalar | tuple[float, ...]], ...]

    def at(self, name: str, depth: float = 0.0) -> Scalar | None:
        """Returns the value for the tensor `name` at relative `depth` in [0, 1], None if no case matches."""
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
        """Yields the filters that name something."""
        return (pattern for pattern, _ in self.cases if pattern not in (None, "*"))

    def values(self) -> Iterator[Scalar]:
        """Yields every value of every case."""
        for _, value in self.cases:
            yield from value if isinstance(value, tuple) else (value,)

    @property
    def numeric(self) -> bool:
        """Whether all its values are numbers."""
        return not any(isinstance(value, bool | str) for value in self.values())

    def to_plain(self) -> Any:
        """Returns the value as YAML would hold it."""
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
    raise ValueError(f"must be a number, a string, true or false, got {describe(value)}")


def _parse_scalar_or_gradient(value: object) -> Scalar | tuple[float, ...]:
    if not isinstance(value, list | tuple):
        return _parse_scalar(value)
    if not value:
        raise ValueError("must not be an empty list")
    numbers = []
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise ValueError(f"a list over the layers holds numbers, got {describe(item)}")
        numbers.append(float(item))
    return tuple(numbers)


def parse_setting(value: object) -> Setting:
    """Returns a YAML value (a number, a list over layers, {value, filter} items) as a Setting.

    Raises:
        ValueError: not such a value.
    """
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
                raise ValueError(f"`filter` must be a part of a tensor's name, got {describe(pattern)}")
            if cases and cases[-1][0] in (None, "*"):
                raise ValueError("an item without filter matches everything: it must be the last one")
            cases.append((pattern, _parse_scalar_or_gradient(item["value"])))
        return Setting(tuple(cases))
    return Setting(((None, _parse_scalar_or_gradient(value)),))


ParameterSetting = Annotated[Setting, PlainValidator(parse_setting)]


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
        """Returns whether both name the same input."""
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
    raise ValueError(f"must be a string `path[@revision][+adapter]` or a state dict, got {describe(value)}")


ModelSource = Annotated[ModelRef, PlainValidator(_parse_model)]


def _parse_dtype(value: object) -> str:
    name = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    if name not in DTYPES:
        raise ValueError(f"must be one of {', '.join(DTYPES)}, got {describe(value)}")
    return name


DTypeName = Annotated[str, PlainValidator(_parse_dtype)]

_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(value: object) -> int:
    """Returns a size such as 5GB, 500MB, 2GiB or a plain number in bytes.

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
    raise ValueError(f"must be a size such as 5GB, 500MB or 2GiB, got {describe(value)}")


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
    raise ValueError(f"must be a glob on tensor names or a list of globs, got {describe(value)}")


Globs = Annotated[tuple[str, ...], PlainValidator(_parse_globs)]


def _parse_take_model(value: object) -> int | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"must be a model as `models` lists it, or its number from 0, got {describe(value)}")


TakeModel = Annotated[int | str, PlainValidator(_parse_take_model)]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def describe(value: object) -> str:
    """Returns a value as a message shows it: short, and containers by their type."""
    if value is None:
        return "nothing"
    if isinstance(value, str | int | float | bool):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "…"
    return f"a {type(value).__name__}"
