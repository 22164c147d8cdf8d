"""The two documents beside a merged model: README.md for people and the hub, dirmerge.json for machines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dirmerge.checkpoints.hashing import HASH
from dirmerge.checkpoints.output import MANIFEST
from dirmerge.engine.result import compute_text
from dirmerge.planning import InputPlan, Plan

CARD = "README.md"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


def write_documents(folder: Path, plan: Plan, result: Mapping[str, Any]) -> None:
    """Writes the model card and the manifest.

    Args:
        folder: of the merged model.
        plan: that was run.
        result: what came of it, as plain data (MergeResult.to_dict()).
    """
    (folder / CARD).write_text(card(plan, result), encoding="utf-8")
    text = json.dumps(manifest(plan, result), indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def manifest(plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns everything that is known of the merge: inputs with hashes, λ, a record per tensor, recipe."""
    from dirmerge import __version__

    return {
        "dirmerge": __version__,
        "method": plan.method_name,
        "output": plan.output,
        "scale": {
            "value": result["scale"],
            "alignment": result["alignment"],
            "origin": result["scale_origin"],
        },
        "inputs": [_input(item, plan, result) for item in plan.inputs],
        "totals": plan.totals(),
        "notes": result["notes"],
        "fallbacks": result["fallbacks"],
        "compute": result["compute"],
        "read_bytes": result["read_bytes"],
        "seconds": result["seconds"],
        "peak_rss": result["peak_rss"],
        "recipe": plan.recipe,
        "tensors": result["tensors"],
    }


def card(plan: Plan, result: Mapping[str, Any]) -> str:
    """Returns the model card: front matter for the hub, method, λ, options, inputs with hashes, recipe."""
    from dirmerge import __version__

    front: dict[str, Any] = {}
    base = _hub_name(plan)
    if base is not None:
        front["base_model"] = base
    front["base_model_relation"] = "merge" if plan.output == "model" else "adapter"
    front["library_name"] = "transformers" if plan.output == "model" else "peft"
    front["tags"] = ["merge", "dirmerge"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# A merge of {len(plan.tasks)} {'adapters' if plan.adapters else 'models'}",
        "",
        f"Made with dirmerge {__version__} by the method `{plan.method_name}`: {plan.method.summary}.",
        "",
        f"- scale: {result['scale_text']}",
    ]
    options = _options(plan)
    lines += [f"- options: {options}"] if options else []
    rules = ", ".join(f"{count} {rule}" for rule, count in sorted(result["rules"].items()))
    lines.append(f"- tensors by rule: {rules}")
    lines.append(f"- ran on: {compute_text(result['compute'])}")
    if result["fallbacks"]:
        lines.append(f"- fallbacks in {len(result['fallbacks'])} tensors, see {MANIFEST}")
    lines += ["", "## Inputs", "", "| input | kind | weight | file | BLAKE3 |", "|---|---|---|---|---|"]
    for item in plan.inputs:
        weight = "base" if item is plan.base else _weight(plan, item)
        for file in _input(item, plan, result)["files"] or [{"name": "in memory", HASH: "–"}]:
            digest = f"`{file[HASH]}`" if len(file[HASH]) > 1 else file[HASH]
            cells = [_cell(item.label), item.kind, weight, _cell(file["name"]), digest]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Recipe", "", "```yaml", recipe_text(plan.recipe).strip(), "```", ""]
    return "\n".join(lines)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Returns a recipe as YAML."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)


def _input(item: InputPlan, plan: Plan, result: Mapping[str, Any]) -> dict[str, Any]:
    hashes = result["hashes"]
    return {
        "role": "base" if item is plan.base else "task",
        "source": item.label,
        "kind": item.kind,
        "files": [{"name": Path(file.path).name, HASH: hashes.get(file.path, "–")} for file in item.files],
    }


def _options(plan: Plan) -> str:
    """Returns the method's options with their defaults; those that differ between tensors are called so."""
    merged = [tensor.options for tensor in plan.tensors if tensor.rule == "merge"]
    parts = []
    for name, default in plan.method.options.items():
        values = {repr(options.get(name, default)) for options in merged}
        if values:
            parts.append(f"{name} = {values.pop() if len(values) == 1 else 'per tensor'}")
    return ", ".join(parts)


def _weight(plan: Plan, item: InputPlan) -> str:
    task = next(t for t, other in enumerate(plan.tasks) if other is item)
    weights = {s.weight for tensor in plan.tensors for s in tensor.sources if s.task == task}
    return f"{weights.pop():g}" if len(weights) == 1 else "per tensor"


def _hub_name(plan: Plan) -> str | None:
    """Returns the base's id on the hub: a path of this machine means nothing to others."""
    candidates: list[Any] = []
    if plan.base is not None:
        candidates.append(plan.base.label.split("@")[0])
        base = plan.open().base
        if base is not None and base.checkpoint is not None and base.checkpoint.config:
            candidates.append(base.checkpoint.config.get("_name_or_path"))
    candidates += [task.base_name for task in plan.tasks]
    for name in candidates:
        if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
