"""Writes the files of an inspection's report, and checks which files it may replace."""

from __future__ import annotations

import importlib
import json
import secrets
from pathlib import Path

from dirmerge.checkpoints.files import read_json_object
from dirmerge.diagnostics.page import to_html
from dirmerge.diagnostics.result import Inspection
from dirmerge.errors import CheckpointError, OutputError

# What a page of ours holds in its head: only such a file is replaced.
GENERATOR = b'<meta name="generator" content="dirmerge inspect" />'


def check(html: Path | None, json_path: Path | None, *, overwrite: bool) -> None:
    """Checks, before the work, that a report can be written.

    Args:
        html: the page to write, None for none.
        json_path: the JSON file to write, None for none.
        overwrite: whether files that exist may be replaced; only those that an inspection wrote may.

    Raises:
        OutputError: a file exists and may not be replaced, is a folder, or its folder does not exist; both
            are one file.
        ModuleNotFoundError: jinja2 is missing, which the extra `report` brings.
    """
    paths = [path for path in (html, json_path) if path is not None]
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists; choose another file or pass --overwrite")
        if path.exists() and not _is_report(path):
            raise OutputError(f"{path}: was not written by `dirmerge inspect`, and is not replaced")
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: its folder does not exist")
    if len(paths) == 2 and paths[0].absolute() == paths[1].absolute():
        raise OutputError(f"{html}: is given for both the page and the JSON")
    if html is not None:
        importlib.import_module("jinja2")


def write(inspection: Inspection, html: Path | None = None, json_path: Path | None = None) -> None:
    """Writes the page and the figures; each file is written atomically.

    Raises:
        OutputError: a file cannot be written.
    """
    if html is not None:
        _write(html, to_html(inspection))
    if json_path is not None:
        _write(json_path, json.dumps(inspection.to_dict(), indent=1) + "\n")


def _is_report(path: Path) -> bool:
    """Whether an inspection wrote the file: a page names its generator, JSON has all keys."""
    try:
        with path.open("rb") as file:
            if GENERATOR in file.read(1000):
                return True
        figures = read_json_object(path, limit=1 << 30)
    except (OSError, CheckpointError):
        return False
    return Inspection.model_fields.keys() <= figures.keys()


def _write(path: Path, text: str) -> None:
    # A link is followed, so that it stays one and its target is replaced.
    target = path.resolve()
    part = target.with_name(f".{target.name}.dirmerge-{secrets.token_hex(4)}")
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
