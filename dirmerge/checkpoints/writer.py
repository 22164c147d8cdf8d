"""Writing: a folder that appears complete or not at all, sharded weights, side files, temporary tensors.

Nothing is written into the output folder itself: all goes to a hidden sibling, which is renamed at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dirmerge.checkpoints.reader import CONFIG, INDEX, WEIGHTS
from dirmerge.checkpoints.safetensors_io import (
    Entry,
    SafetensorsFileWriter,
    open_regular,
    read_json_object,
    write_json,
)
from dirmerge.errors import CheckpointError, OutputError

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of a shard by default, as on the Hugging Face hub."""

MANIFEST = "dirmerge.json"
"""The manifest that every folder written by dirmerge holds; without it a folder is not replaced."""

_LOCK = ".dirmerge-lock"
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


class OutputFolder:
    """A folder that appears at `out` complete, or not at all.

    Files go to `path`, a hidden folder beside `out` (same file system, so that renaming it is atomic), which
    commit() puts in place. Left without commit(), by an exception for instance, it is removed, and an
    existing `out` is untouched. What a killed process leaves, `.<name>.dirmerge-staging-<pid>-<random>`, is
    removed by the next run with the same `out`, which can tell by its lock that the process is gone.

    Args:
        out: the folder to make; missing parents are made too.
        overwrite: replace a folder that is not empty, if dirmerge wrote it (it holds dirmerge.json) and
            none of `protected` is, contains or lies in it. It is renamed away, the new one renamed in, then
            the old one removed; if the process is killed between the two renames, the next run restores it.
        protected: files and folders that must not be lost, such as the inputs and the recipe. The working
            directory is always protected, but a folder inside it may be replaced.

    Raises:
        OutputError: if `out` is a file, holds something (without overwrite), holds something that must not
            be replaced, or its parent cannot be written.
    """

    def __init__(
        self, out: str | Path, overwrite: bool = False, protected: Iterable[str | Path] = ()
    ) -> None:
        # a link is followed, so that it stays one and its target is replaced
        self.out = Path(out).expanduser().resolve()
        self._overwrite = overwrite
        self._protected = [Path(path) for path in protected]
        self._path: Path | None = None
        self._lock: int | None = None
        self._made: list[Path] = []
        if not self.out.name:
            raise OutputError(f"{out}: cannot be an output folder")
        self._check()

    @property
    def path(self) -> Path:
        """The folder to write to, inside `with`."""
        if self._path is None:
            raise ValueError("the output folder is open only inside `with`, before commit()")
        return self._path

    def __enter__(self) -> OutputFolder:
        try:
            self._make_parents()
            self._remove_leftovers()
            self._check()
            self._stage()
        except OSError as error:
            self._discard()
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.out}: cannot be written: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def commit(self) -> None:
        """Flushes everything to the disk and puts it in place.

        Raises:
            OutputError: if `out` was filled by somebody else meanwhile, or cannot be replaced; it is then as
                before.
        """
        path = self.path
        try:
            self._check()
            for folder, _, files in os.walk(path):
                for name in files:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            replaced: Path | None = None
            if self.out.exists() and any(self.out.iterdir()):
                replaced = self._sibling("replaced")
                self.out.rename(replaced)
            try:
                path.rename(self.out)
            except OSError:
                if replaced is not None:
                    replaced.rename(self.out)
                raise
            self._path = None
            self._made = []
            (self.out / _LOCK).unlink(missing_ok=True)
            _fsync(self.out.parent)
            if replaced is not None:
                # another name, so that a half-removed folder is never restored
                discarded = self._sibling("discarded")
                replaced.rename(discarded)
                shutil.rmtree(discarded, ignore_errors=True)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.out}: cannot be put in place: {error.strerror or error}") from error

    def _check(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out}: is a file")
        if not self.out.is_dir() or not any(self.out.iterdir()):
            return
        if not self._overwrite:
            raise OutputError(
                f"{self.out}: exists and is not empty; choose another folder or allow overwriting"
            )
        _check_replaceable(self.out, self._protected)

    def _sibling(self, what: str) -> Path:
        return self.out.parent / f".{self.out.name}.dirmerge-{what}-{os.getpid()}-{secrets.token_hex(4)}"

    def _make_parents(self) -> None:
        missing = [self.out.parent, *self.out.parent.parents]
        for folder in reversed(missing):
            if not folder.exists():
                folder.mkdir()
                self._made.append(folder)

    def _stage(self) -> None:
        """Makes the staging folder and takes its lock, which the kernel frees when the process is gone."""
        while self._lock is None:
            path = self._sibling("staging")
            path.mkdir()
            self._path = path
            try:
                lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # another process took the empty folder for a leftover
            if _try_lock(lock) and (path / _LOCK).exists():
                self._lock = lock
            else:
                # another process found the lock free before we took it, and is removing the folder
                os.close(lock)
                shutil.rmtree(path, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        name = re.escape(self.out.name)
        pattern = re.compile(rf"\.{name}\.dirmerge-(staging|replaced|discarded)-\d+-[0-9a-f]{{8}}")
        for entry in sorted(self.out.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match is None or entry.is_symlink() or not entry.is_dir():
                continue
            if match[1] == "replaced" and not self.out.exists():
                entry.rename(self.out)  # its process was killed between the two renames
                continue
            if match[1] != "staging":
                shutil.rmtree(entry, ignore_errors=True)
                continue
            try:
                lock = os.open(entry / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                with contextlib.suppress(OSError):
                    entry.rmdir()  # its process was killed before it made the lock, or is about to
                continue
            try:
                if _try_lock(lock):
                    shutil.rmtree(entry, ignore_errors=True)
            finally:
                os.close(lock)

    def _discard(self) -> None:
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()
        self._made = []


def _check_replaceable(folder: Path, protected: Iterable[Path]) -> None:
    """Raises OutputError unless dirmerge wrote the folder, and replacing it loses nothing protected.

    Files are compared by device and inode, so that links, bind mounts and other spellings of a path count as
    what they lead to.
    """
    lineage = _lineage(folder)
    for path in protected:
        # Both ends of a link count: a folder of links, as in the hub's cache, leads to files elsewhere.
        for place in (Path(os.path.abspath(path.expanduser())), path.expanduser().resolve()):
            if lineage[0] in _lineage(place):
                raise OutputError(f"{folder}: holds the input {path}; choose another folder")
            if place.is_dir() and _identity(place) in lineage:
                raise OutputError(f"{folder}: lies in the input {path}; choose another folder")
    if lineage[0] in _lineage(Path.cwd()):
        raise OutputError(f"{folder}: holds the working directory; choose another folder")
    try:
        written = read_json_object(folder / MANIFEST, limit=1 << 30, allow_nan=True)
    except CheckpointError:
        written = {}
    if "dirmerge" not in written:
        raise OutputError(
            f"{folder}: was not written by dirmerge (it holds no {MANIFEST}), and is not replaced; choose "
            "another folder or remove it yourself"
        )


def _lineage(path: Path) -> list[tuple[int, int] | None]:
    """Returns the identities of a path and of every folder above it; None for those that do not exist."""
    return [_identity(place) for place in (path, *path.parents)]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class ShardedWriter:
    """Writes model.safetensors, or shards with their index: tensors and rows in any order, from any thread.

    Shards are filled in the order of `entries` and hold whole tensors; a tensor larger than `shard_size` has
    a shard of its own. Writing about in that order keeps one or two files open.

    Args:
        folder: where the files go.
        entries: (name, dtype, shape) of every tensor.
        shard_size: bytes of a shard.
        metadata: strings for the headers.

    Raises:
        ValueError: for no entries or a shard size below 1; see SafetensorsFileWriter for the entries.
        OutputError: if there is not enough space, or a file exists.
    """

    def __init__(
        self,
        folder: str | Path,
        entries: Iterable[Entry],
        shard_size: int = DEFAULT_SHARD_SIZE,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._metadata = {"format": "pt"} if metadata is None else dict(metadata)
        shards, self.total_size = plan_shards(entries, shard_size)
        self._shards: dict[str, list[Entry]] = {}
        for part, shard in enumerate(shards, 1):
            name = WEIGHTS if len(shards) == 1 else f"model-{part:05d}-of-{len(shards):05d}.safetensors"
            self._shards[name] = shard
        self._where = {name: file for file, shard in self._shards.items() for name, _, _ in shard}
        self._open: dict[str, SafetensorsFileWriter] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()
        free = shutil.disk_usage(self.folder).free
        if free < self.total_size:
            raise OutputError(f"{self.folder}: needs {self.total_size} bytes, only {free} are free")

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return [self.folder / name for name in self._shards]

    def write(self, name: str, tensor: Tensor, start: int | None = None) -> None:
        """Writes a tensor, or its rows from `start` on; see SafetensorsFileWriter.write."""
        if name not in self._where:
            raise ValueError(f"{name!r} is not a planned tensor of {self.folder}")
        file = self._where[name]
        with self._lock:
            if file in self._done:
                raise ValueError(f"{name!r} was written before")
            writer = self._open.get(file)
            if writer is None:
                writer = SafetensorsFileWriter(self.folder / file, self._shards[file], self._metadata)
                self._open[file] = writer
        writer.write(name, tensor, start)
        with self._lock:
            finished = writer.complete and file not in self._done
            if finished:
                self._done.add(file)
        if finished:
            # Outside the lock: the other files need not wait until this one is on the disk.
            writer.close()
            with self._lock:
                del self._open[file]

    def close(self) -> None:
        """Checks that every tensor was written and writes the index; ValueError names what is missing."""
        missing = [name for name, file in self._where.items() if file not in self._done | self._open.keys()]
        try:
            for file in list(self._open):
                self._open[file].close()
                del self._open[file]
                self._done.add(file)
            if missing:
                raise ValueError(
                    f"{self.folder}: {len(missing)} tensors were not written, e.g. {missing[0]!r}"
                )
        except BaseException:
            self.abort()
            raise
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self.total_size},
                "weight_map": dict(sorted(self._where.items())),
            }
            write_json(self.folder / INDEX, index)

    def abort(self) -> None:
        """Closes and removes the files that are not complete."""
        for writer in self._open.values():
            writer.abort()
        self._open = {}


def plan_shards(entries: Iterable[Entry], shard_size: int) -> tuple[list[list[Entry]], int]:
    """Splits tensors into shards, in order.

    Args:
        entries: (name, dtype, shape) of every tensor.
        shard_size: bytes that a shard of more than one tensor may have.

    Returns:
        The shards, and the bytes of all tensors.

    Raises:
        ValueError: for no entries, repeated names, or a shard size below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    shards: list[list[Entry]] = []
    names: set[str] = set()
    total = room = 0
    for name, dtype, shape in entries:
        if name in names:
            raise ValueError(f"tensor names must be unique, got {name!r} twice")
        names.add(name)
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if not shards or nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append((name, dtype, tuple(shape)))
        room -= nbytes
        total += nbytes
    if not shards:
        raise ValueError("entries must not be empty")
    return shards, total


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


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
