"""What a recipe must satisfy beyond its types: names, combinations, what dirmerge does not do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dirmerge.methods import METHODS, get_method
from dirmerge.recipe.align import AlignSection, AlignTask, LearnOptions
from dirmerge.recipe.schema import (
    ENGINE_PARAMETERS,
    ModelEntry,
    Recipe,
    TensorRule,
    TokenizerEntry,
    is_inline_template,
)
from dirmerge.recipe.settings import Setting, describe, suggestion

# fmt: off
_MERGEKIT_ONLY_METHODS = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "core_space", "dare_linear", "dare_ties", "della",
    "della_linear", "karcher", "model_breadcrumbs", "model_stock", "multislerp", "nearswap", "nuslerp",
    "passthrough", "ram", "ramplus_tl", "sce", "slerp",
})
# fmt: on

# mergekit's names for options, with the values under which the two programs compute the same thing.
_NORMALIZE_EQUIVALENT = {"linear": True, "average": True, "ties": True, "task_arithmetic": False}

UNSUPPORTED_KEYS = {
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


def recipe_problems(recipe: Recipe, *, complete: bool) -> list[str]:
    """Returns what pydantic cannot see; `complete` is False when known problems explain an empty list."""
    problems = []
    if not recipe.models and complete:
        problems.append("models: list at least one model")
    elif recipe.models and not recipe.tasks():
        problems.append("models: lists only the base model; list at least one fine-tune")
    if recipe.tokenizer_source is not None and recipe.tokenizer is not None:
        problems.append("tokenizer: give either `tokenizer_source` or `tokenizer`, not both")
    labels = [entry.model.label for entry in recipe.models]
    source = recipe.tokenizer_from
    if source == "union":
        problems.append(
            "tokenizer_source: a union of tokenizers needs new embedding rows, which dirmerge does not "
            "build; use `base` or a listed model, with a `tensors:` rule `common_rows` for the embedding"
        )
    elif source not in ("base", recipe.base_model and recipe.base_model.label, *labels):
        problems.append(
            f"tokenizer_source: must be `base` or a listed model, got {source!r}" + suggestion(source, labels)
        )
    if recipe.chat_template is not None:
        problems += _chat_template_problems(recipe.chat_template)
    for i, rule in enumerate(recipe.tensors):
        if (rule.rule == "take") != (rule.model is not None):
            problems.append(
                f"tensors[{i}].model: `take` needs the model to take from"
                if rule.rule == "take"
                else f"tensors[{i}].model: only the rule `take` names a model, remove it or use `take`"
            )
        elif isinstance(rule.model, int) and rule.model >= len(recipe.models):
            problems.append(
                f"tensors[{i}].model: must be less than {len(recipe.models)}, the number of models, "
                f"got {rule.model}"
            )
        elif isinstance(rule.model, str) and rule.model not in labels:
            problems.append(
                f"tensors[{i}].model: must be a listed model, got {rule.model!r}"
                + suggestion(rule.model, labels)
            )
    if recipe.align is not None and complete:
        labels = [task.model.label for task in recipe.tasks()]
        problems += recipe.align.problems(labels, recipe.merge_method)
    problems += _task_parameter_problems(recipe)
    problems += _normalize_problems(recipe)
    if recipe.scale is not None and not recipe.scale.numeric:
        problems.append("scale: must be a number")
    return problems


def _task_parameter_problems(recipe: Recipe) -> list[str]:
    problems = []
    for i, entry in enumerate(recipe.models):
        if entry.parameters and not any(entry is task for task in recipe.tasks()):
            problems.append(f"models[{i}].parameters: the base has no delta, remove its parameters")
    tasks = recipe.tasks()
    for key in sorted({key for entry in tasks for key in entry.parameters} - {"weight"}):
        values = [entry.parameters.get(key) for entry in tasks]
        if any(value != values[0] for value in values):
            problems.append(
                f"models[…].parameters.{key}: {recipe.merge_method} has one {key} for all models; give "
                f"every model the same value, or set parameters.{key}"
            )
    for path, setting in _weight_settings(recipe):
        if not setting.numeric:
            problems.append(f"{path}: must be a number")
    return problems


def _weight_settings(recipe: Recipe) -> Iterator[tuple[str, Setting]]:
    if "weight" in recipe.parameters:
        yield "parameters.weight", recipe.parameters["weight"]
    for i, entry in enumerate(recipe.models):
        if "weight" in entry.parameters:
            yield f"models[{i}].parameters.weight", entry.parameters["weight"]


def _normalize_problems(recipe: Recipe) -> list[str]:
    setting = recipe.parameters.get("normalize")
    if setting is None:
        return []
    wanted = _NORMALIZE_EQUIVALENT.get(recipe.merge_method)
    if wanted is not None and setting.constant is wanted:
        return []
    if wanted is None:
        return [f"parameters.normalize: {recipe.merge_method} has no such option, remove it"]
    return [f"parameters.normalize: must be {str(wanted).lower()} for {recipe.merge_method}, or left out"]


def unsupported_keys(plain: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with mergekit's keys that dirmerge does not have."""
    problems = [
        f"{key}: {UNSUPPORTED_KEYS[key]}" for key in ("slices", "modules") if plain.get(key) is not None
    ]
    tokenizer = plain.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        for key in ("tokens", "pad_to_multiple_of"):
            if tokenizer.get(key) is not None:
                problems.append(f"tokenizer.{key}: {UNSUPPORTED_KEYS[f'tokenizer.{key}']}")
    return problems


def lift_scale(plain: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Moves scale, lambda and alignment out of `parameters`; each may be given once."""
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


def parameter_problems(plain: Mapping[str, Any]) -> list[str]:
    """Returns unknown methods and unknown parameter names, with suggestions."""
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


def translate(error: ValidationError) -> list[str]:
    """Returns pydantic's complaints as sentences that start with the key."""
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
                text = f"must be {item['ctx']['expected']}, got {describe(item['input'])}"
                expected = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
                text += suggestion(str(item["input"]), expected)
            case _:
                text = f"{item['msg'][:1].lower()}{item['msg'][1:]}, got {describe(item['input'])}"
        problems.append(f"{path}: {text}" if path else text)
    return problems
