"""Recipes from YAML files, YAML text and dicts; all that is wrong with one is listed in one error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dirmerge.errors import RecipeError
from dirmerge.recipe.checks import (
    UNSUPPORTED_KEYS,
    lift_scale,
    parameter_problems,
    recipe_problems,
    translate,
    unsupported_keys,
)
from dirmerge.recipe.schema import Recipe
from dirmerge.recipe.settings import describe

MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_NODES = 100_000


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """Returns the recipe in a YAML file, in YAML text (a string of several lines) or in a dict.

    Raises:
        RecipeError: unreadable, not YAML, or invalid; the message lists everything that is wrong with it.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _from_plain(dict(source), "recipe")
    if isinstance(source, str) and "\n" in source:
        return _from_plain(_parse_yaml(source.encode(), "recipe"), "recipe")
    path = Path(source).expanduser()
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    recipe = _from_plain(_parse_yaml(content, str(path)), str(path))
    recipe._file = path
    return recipe


def _from_plain(plain: dict[str, Any], origin: str) -> Recipe:
    problems = unsupported_keys(plain)
    known = {key: value for key, value in plain.items() if key not in ("slices", "modules")}
    if isinstance(known.get("tokenizer"), Mapping):
        known["tokenizer"] = {
            key: value
            for key, value in known["tokenizer"].items()
            if f"tokenizer.{key}" not in UNSUPPORTED_KEYS
        }
    if problems and "models" not in known:
        known["models"] = []  # slices stand in for models: one complaint is enough
    problems += parameter_problems(known)
    fields, scale_problems = lift_scale(known)
    problems += scale_problems
    recipe = None
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        problems += translate(error)
    if recipe is not None:
        problems += recipe_problems(recipe, complete=not problems)
    if problems or recipe is None:
        raise RecipeError(_list_problems(origin, problems))
    recipe._plain = plain
    recipe._origin = origin
    return recipe


class _Loader(yaml.SafeLoader):
    """SafeLoader which refuses duplicate keys and reads 1e-5 as the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(content: bytes, origin: str) -> dict[str, Any]:
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{origin}: exceeds the limit of {MAX_RECIPE_BYTES} bytes")
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
        raise RecipeError(f"{origin}: must be a mapping with merge_method and models, got {describe(plain)}")
    return plain


def _check_nodes(root: yaml.Node, origin: str) -> None:
    """Refuses duplicate keys, and aliases that expand to more than a recipe can need."""
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
            raise RecipeError(f"{origin}: exceeds the limit of {MAX_RECIPE_NODES} values")
        sizes[key] = total
        return total

    size(root)
    if problems:
        raise RecipeError(_list_problems(origin, problems))


def _list_problems(origin: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{origin}: {problems[0]}"
    return f"{origin}: {len(problems)} problems:" + "".join(f"\n  {problem}" for problem in problems)


def _one_line(text: str) -> str:
    return " ".join(text.split())
