"""Unlabelled inputs from local files: csv, json, parquet and image folders, read by the package datasets."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dirmerge.alignment.model import Batch
from dirmerge.errors import CheckpointError, DirmergeError, RecipeError
from dirmerge.linalg import seed_for

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_IMAGE = "image"


class MissingPackageError(DirmergeError):
    """A package of the extra `align` is not installed."""


def read_inputs(data: str, column: str | None, count: int, seed: int) -> tuple[list[Any], bool]:
    """Reads at most `count` inputs of a local file or image folder, drawn at random.

    Args:
        data: a csv, tsv, json, jsonl or parquet file, or a folder of images.
        column: the column of the texts or images; default `text`, `image` in a folder.
        count: at most so many.
        seed: of the draw.

    Returns:
        The inputs, and whether they are images.

    Raises:
        MissingPackageError: datasets is not installed.
        CheckpointError: the file is missing or cannot be read.
        RecipeError: no such column, or one that holds neither texts nor images; or no input at all.
    """
    path = Path(data).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    datasets = _datasets()
    if path.is_dir():
        builder, options = "imagefolder", {"data_dir": str(path), "drop_labels": True}
    elif path.suffix.lower() in _BUILDERS:
        builder, options = _BUILDERS[path.suffix.lower()], {"data_files": str(path)}
        if path.suffix.lower() == ".tsv":
            options["sep"] = "\t"
    else:
        raise CheckpointError(f"{path}: must be a folder of images or one of {', '.join(sorted(_BUILDERS))}")
    wanted = column or (_IMAGE if path.is_dir() else "text")
    with tempfile.TemporaryDirectory(prefix="dirmerge-") as cache:
        try:
            table = datasets.load_dataset(
                builder, split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except Exception as error:  # whatever the parsers of datasets raise
            raise CheckpointError(f"{path}: cannot be read: {_cause(error)}") from error
        if wanted not in table.column_names:
            raise RecipeError(
                f"{path}: has no column {wanted!r}; it has {', '.join(table.column_names)}; set `column`"
            )
        images = isinstance(table.features[wanted], datasets.Image)
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:count]
        inputs = [table[int(i)][wanted] for i in order]
    if not inputs:
        raise RecipeError(f"{path}: holds no inputs")
    if not images and not all(isinstance(text, str) and text for text in inputs):
        bad = next(text for text in inputs if not (isinstance(text, str) and text))
        raise RecipeError(
            f"{path}: column {wanted!r} must hold texts or images, got {type(bad).__name__} {str(bad)[:40]!r}"
        )
    return inputs, images


def make_batches(
    inputs: Sequence[Any], images: bool, folder: Path, size: int, max_length: int
) -> list[Batch]:
    """Turns texts or images into a model's batches, by the tokenizer or image processor of its folder.

    Raises:
        CheckpointError: the folder has none that transformers can load.
    """
    import transformers

    try:
        if images:
            loader: Any = transformers.AutoImageProcessor
        else:
            loader = transformers.AutoTokenizer
        tool = loader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        what = "image processor" if images else "tokenizer"
        raise CheckpointError(f"{folder}: has no {what} that transformers loads: {_cause(error)}") from error
    if not images and tool.pad_token is None:
        tool.pad_token = tool.eos_token
    found: list[Batch] = []
    for start in range(0, len(inputs), size):
        part = list(inputs[start : start + size])
        if images:
            batch = tool(images=[image.convert("RGB") for image in part], return_tensors="pt")
        else:
            batch = tool(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        found.append(dict(batch))
    return found


def task_seed(name: str, seed: int) -> int:
    """The seed of a task's draw."""
    return seed_for(f"align:{name}", seed)


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"local data is read by the package {error.name}, which is missing: pip install 'dirmerge[align]'"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _cause(error: BaseException) -> str:
    """The innermost cause in one line: datasets wraps what its parsers say."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
