"""Copying what belongs to a model beside its weights: configuration, tokenizer, code, licence."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from dirmerge.checkpoints.files import open_regular, read_json_object, write_json
from dirmerge.checkpoints.reader import CONFIG
from dirmerge.errors import OutputError

# What belongs to a model beside its weights, at the top of its folder.
_SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
_NEVER = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".safetensors",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)


def copy_side_files(source: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> list[str]:
    """Copies what belongs to a model beside its weights: configuration, tokenizer, code, licence.

    Args:
        source: the model's folder.
        out: the folder to copy to.
        dtype: the output's dtype: stated in config.json where that states one. None leaves config.json as it
            is.

    Returns:
        The names of the copied files.

    Raises:
        CheckpointError: if a file cannot be read.
        OutputError: if one cannot be written.
    """
    source, out = Path(source), Path(out)
    copied: list[str] = []
    for entry in sorted(source.iterdir()):
        name = entry.name
        if name.endswith(_NEVER) or not any(fnmatch(name, pattern) for pattern in _SIDE_FILES):
            continue
        if not entry.is_file():
            continue
        _copy(entry, out / name)
        copied.append(name)
    if dtype is not None and CONFIG in copied:
        config = read_json_object(source / CONFIG, allow_nan=True)
        if _set_dtype(config, str(dtype).removeprefix("torch.")):
            write_json(out / CONFIG, config)
    return copied


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """States the dtype wherever the configuration states one, also in its parts; True if that changed it."""
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value != name:
            config[key] = name
            changed = True
        elif key.endswith("_config") and isinstance(value, dict):
            changed |= _set_dtype(value, name)
    return changed


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as file:
        try:
            with target.open("xb") as copy:
                shutil.copyfileobj(file, copy)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
