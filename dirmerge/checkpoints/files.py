"""Reading the bytes of regular files in pieces, and JSON objects strictly; every error names the file."""

from __future__ import annotations

import io
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dirmerge.errors import CheckpointError, OutputError

PIECE = 8 << 20
"""Bytes of a piece in which files are read: large enough for any disk, small enough for a CPU's cache."""

PieceCallback = Callable[[int, memoryview], None]


def open_regular(path: Path) -> io.FileIO:
    """Opens a regular file for unbuffered reading; a pipe or folder is a CheckpointError, not a hang."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file")
    return io.FileIO(descriptor, "rb")


def fill(file: io.FileIO, view: memoryview, what: str) -> None:
    """Fills memory from a file's position on; CheckpointError about `what` if the file ends before."""
    position = 0
    while position < view.nbytes:
        try:
            # one call reads at most 2 GiB on Linux
            count = file.readinto(view[position : position + (1 << 30)])
        except OSError as error:
            raise CheckpointError(f"{what} cannot be read: {error.strerror or error}") from error
        if not count:
            raise CheckpointError(
                f"{what} is truncated: {view.nbytes - position} of {view.nbytes} bytes are missing"
            )
        position += count


def read_pieces(
    path: Path,
    stamp: tuple[int, int] | None,
    begin: int,
    end: int,
    target: Callable[[int, int], memoryview],
    passed: PieceCallback | None = None,
    what: str = "it",
) -> None:
    """Reads the bytes begin:end of a file in pieces of at most PIECE bytes.

    Args:
        path: the file.
        stamp: its size and modification time when its header was read; None not to compare them.
        begin: first byte.
        end: byte after the last.
        target: returns the memory for the piece of a given offset and size.
        passed: called with the offset and the bytes of every piece that was read.
        what: what is read, for messages.

    Raises:
        CheckpointError: if the file is gone, ends before, cannot be read or was changed.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        if stamp is not None and stamp != (status.st_size, status.st_mtime_ns):
            raise CheckpointError(f"{path}: was changed while dirmerge was reading it ({what})")
        file.seek(begin)
        for at in range(begin, end, PIECE):
            view = target(at, min(PIECE, end - at))
            fill(file, view, f"{path}: {what}")
            if passed is not None:
                passed(at, view)


def parse_json_object(data: bytes, what: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, bounded nesting.

    Args:
        data: the bytes.
        what: how errors call them, e.g. the path.
        allow_nan: accept NaN and Infinity, which some model configurations contain.

    Returns:
        The object as a dict.

    Raises:
        CheckpointError: for anything else than one JSON object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            count = Counter(key for key, _ in items)
            raise ValueError(f"the key {count.most_common(1)[0][0]!r} occurs twice")
        return result

    def constant(text: str) -> float:
        if not allow_nan:
            raise ValueError(f"{text} is not a JSON value")
        return float(text)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{what}: malformed JSON: nested too deeply") from None
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{what}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: must hold a JSON object, got {type(value).__name__}")
    return value


def read_json_object(path: Path, limit: int = 10_000_000, *, allow_nan: bool = False) -> dict[str, Any]:
    """Reads a JSON file of at most `limit` bytes; see parse_json_object."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{path}: larger than {limit} bytes, which no such file should be")
    return parse_json_object(data, str(path), allow_nan=allow_nan)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented, with a final newline; OutputError if that fails."""
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
