"""The results of the real-task benchmark: one JSON file per run, written row by row as the rows come."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "results" / "tasks"


class ResultsError(RuntimeError):
    """A results file is of another setup than the run that wants to add to it."""


class Results:
    """The rows of one run, by name; a row that is there is not computed again.

    Several processes may add rows to one file: each reads it anew under a lock before it writes.

    Args:
        path: the JSON file, made with its folder where there is none.
        about: what the run is (tasks, texts, seed…); the file's own must be the same.

    Raises:
        ResultsError: the file is of another run.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = dict(about)
        found = read(path)["about"] if path.is_file() else self.about
        if found != json.loads(json.dumps(self.about)):
            changed = [key for key in {**found, **self.about} if found.get(key) != self.about.get(key)]
            raise ResultsError(
                f"{path} was made with other {', '.join(sorted(changed))}: move it away, or name another "
                "folder"
            )

    def get(self, name: str) -> Row | None:
        """The row of that name, or None."""
        row: Row | None = read(self.path)["rows"].get(name) if self.path.is_file() else None
        return row

    def once(self, name: str, compute: Callable[[], Row]) -> Row:
        """The row of that name; computed and written first if it is not there."""
        row = self.get(name)
        if row is None:
            row = json.loads(json.dumps(compute()))
            self._add(name, row)
        return row

    def _add(self, name: str, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            rows = read(self.path)["rows"] if self.path.is_file() else {}
            rows[name] = row
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=self.path.parent, prefix=f".{self.path.name}-", delete=False
            ) as file:
                file.write(_text(self.about, rows))
            os.chmod(file.name, 0o644)
            os.replace(file.name, self.path)
        finally:
            os.close(folder)


def read(path: Path) -> dict[str, Any]:
    """The file's `about` and `rows`."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _text(about: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    """JSON with one row per line, sorted, so that a diff shows the rows that are new."""
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name], sort_keys=True)}" for name in sorted(rows)]
    return f'{{"about": {json.dumps(about, sort_keys=True)},\n"rows": {{\n' + ",\n".join(lines) + "\n}}\n"


def pack(bits: str) -> str:
    """Hits of one task's texts, a string of 0 and 1, as `count:hex`."""
    return f"{len(bits)}:{int(bits, 2):x}"


def unpack(text: str) -> str:
    """What `pack` was given."""
    count, digits = text.split(":")
    return f"{int(digits, 16):0{count}b}"
