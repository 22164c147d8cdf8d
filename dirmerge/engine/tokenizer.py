"""Whose tokenizer the output gets, and its chat template."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from dirmerge.checkpoints.files import read_json_object
from dirmerge.errors import RecipeError
from dirmerge.planning import Plan
from dirmerge.recipe import is_inline_template

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)


def finish_tokenizer(plan: Plan, folder: Path) -> None:
    """Puts the tokenizer and the chat template of the recipe into an output folder that has the base's.

    Raises:
        RecipeError: the model named has no tokenizer, or no model has a chat template.
    """
    if plan.tokenizer != "base":
        _copy_tokenizer(plan, folder)
    if plan.chat_template is None:
        return
    if plan.chat_template == "auto":
        text = _most_common_template(plan)
    elif is_inline_template(plan.chat_template):
        text = plan.chat_template
    else:
        text = Path(plan.chat_template).expanduser().read_text(encoding="utf-8")
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    # A template in the configuration would stand beside the file, and readers differ in which they take.
    config_path = folder / TOKENIZER_CONFIG
    if config_path.is_file():
        config = read_json_object(config_path)
        if config.pop("chat_template", None) is not None:
            text = json.dumps(config, indent=2, ensure_ascii=False)
            config_path.write_text(text + "\n", encoding="utf-8")


def _copy_tokenizer(plan: Plan, folder: Path) -> None:
    label = plan.tokenizer
    source = next(item for item in plan.open().all if item.label == label).folder
    files = _tokenizer_files(source) if source is not None else []
    if not files:
        raise RecipeError(f"{plan.origin}: tokenizer_source: {label} has no tokenizer files")
    for path in _tokenizer_files(folder):
        path.unlink()
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for glob in _TOKENIZER_FILES for path in folder.glob(glob) if path.is_file()})


def _most_common_template(plan: Plan) -> str:
    """Returns the template that most models have; of those that tie the first, fine-tunes before the base."""
    inputs = plan.open()
    items = [*inputs.tasks, *([inputs.base] if inputs.base is not None else [])]
    templates = [text for item in items if (text := _template(item.folder)) is not None]
    if not templates:
        raise RecipeError(f"{plan.origin}: chat_template: auto finds no model with a chat template")
    return Counter(templates).most_common(1)[0][0]


def _template(folder: Path | None) -> str | None:
    if folder is None:
        return None
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    template = read_json_object(folder / TOKENIZER_CONFIG).get("chat_template")
    return template if isinstance(template, str) else None
