"""Writing a model's weights as one file, or as shards with their index."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from dirmerge.checkpoints.files import write_json
from dirmerge.checkpoints.reader import INDEX, WEIGHTS
from dirmerge.checkpoints.safetensors_writer import Entry, SafetensorsFileWriter
from dirmerge.errors import OutputError

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of a shard by default, as on the Hugging Face hub."""


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
