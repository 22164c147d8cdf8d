"""Writing safetensors files tensor by tensor, so that no file is ever whole in memory."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dirmerge.checkpoints.safetensors_reader import (
    DTYPES,
    MAX_HEADER,
    METADATA,
    Shape,
    check_rows,
    require_little_endian,
)
from dirmerge.errors import OutputError

Entry = tuple[str, torch.dtype, Sequence[int]]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class SafetensorsFileWriter:
    """Writes one safetensors file whose content is known up front, tensor by tensor.

    The header is written first; the tensors and their rows then come in any order, from any thread, each
    entry once. Inside the file wider dtypes come first, so that every tensor is aligned to its element size,
    which readers that map the file require.

    Args:
        path: the file; it must not exist.
        entries: (name, dtype, shape) of every tensor.
        metadata: strings for the header; {"format": "pt"} is what model loaders expect.

    Raises:
        ValueError: for a name that occurs twice, or a dtype that the format lacks.
        OutputError: if the file exists or cannot be written.
    """

    def __init__(
        self, path: str | Path, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        require_little_endian()
        self.path = Path(path)
        planned: dict[str, tuple[torch.dtype, Shape]] = {}
        for name, dtype, shape in entries:
            if name in planned or name == METADATA:
                raise ValueError(f"tensor names must be unique and not {METADATA}, got {name!r} again")
            if dtype not in _NAMES:
                raise ValueError(f"safetensors cannot store {dtype} (tensor {name!r})")
            planned[name] = (dtype, tuple(int(size) for size in shape))
        header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
        position = 0
        spans: dict[str, tuple[int, int]] = {}
        for name in sorted(planned, key=lambda key: -planned[key][0].itemsize):
            dtype, shape = planned[name]
            nbytes = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + nbytes],
            }
            spans[name] = (position, nbytes)
            position += nbytes
        raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        raw += b" " * (-len(raw) % 8)
        if len(raw) > MAX_HEADER:
            raise ValueError(
                f"the header must have at most {MAX_HEADER} bytes, got {len(raw)}: write more shards"
            )
        self._planned = planned
        self._spans = {name: (8 + len(raw) + offset, nbytes) for name, (offset, nbytes) in spans.items()}
        # Of each tensor that is not complete: the byte ranges that were begun (end by begin), and the bytes
        # that are still to come.
        self._pending: dict[str, dict[int, int]] = {name: {} for name in planned}
        self._left = {name: nbytes for name, (_, nbytes) in spans.items()}
        self._lock = threading.Lock()
        try:
            self._file: io.FileIO | None = io.FileIO(self.path, "xb")
            self._put(0, memoryview(struct.pack("<Q", len(raw)) + raw))
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> SafetensorsFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def complete(self) -> bool:
        """Whether every tensor was written."""
        return not self._pending

    def write(self, name: str, tensor: Tensor, start: int | None = None) -> None:
        """Writes a tensor, or some of its rows.

        Args:
            name: one of the planned names.
            tensor: the whole tensor; with `start`, the rows from `start` on.
            start: first row.

        Raises:
            ValueError: for an unknown name, another dtype or shape than planned, or rows that were written
                before.
            OutputError: if the bytes cannot be written.
        """
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        if name not in self._planned:
            raise ValueError(f"{name!r} is not a planned tensor of {self.path}")
        dtype, shape = self._planned[name]
        if tensor.dtype != dtype:
            raise ValueError(f"{name!r} must be {dtype} as planned, got {tensor.dtype}")
        begin = 0
        if start is None:
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name!r} must have shape {shape} as planned, got {tuple(tensor.shape)}")
        else:
            if not shape or tuple(tensor.shape[1:]) != shape[1:] or tensor.ndim != len(shape):
                raise ValueError(
                    f"rows of {name!r} must have shape (rows, {shape[1:]}), got {tuple(tensor.shape)}"
                )
            check_rows(start, start + tensor.shape[0], shape[0], name)
            begin = start * math.prod(shape[1:]) * dtype.itemsize
        data = tensor_bytes(tensor)
        self._claim(name, begin, begin + data.nbytes)
        try:
            self._put(self._spans[name][0] + begin, data)
        except OSError as error:
            raise OutputError(
                f"{self.path}: tensor {name!r} cannot be written: {error.strerror or error}"
            ) from error
        with self._lock:
            self._left[name] -= data.nbytes
            if self._left[name] == 0:
                del self._pending[name]

    def close(self) -> None:
        """Checks that all tensors are complete (ValueError if not), flushes to the disk and closes."""
        if self._file is None:
            return
        if self._pending:
            self.abort()
            missing = next(iter(self._pending))
            raise ValueError(
                f"{self.path}: {len(self._pending)} tensors were not written completely, e.g. {missing!r}"
            )
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        finally:
            self._file.close()
            self._file = None

    def abort(self) -> None:
        """Closes and removes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)

    def _claim(self, name: str, begin: int, end: int) -> None:
        """Notes that a byte range of a tensor is written; ValueError if some of it was before."""
        with self._lock:
            if name not in self._pending:
                raise ValueError(f"{name!r} was written before")
            done = self._pending[name]
            if any(begin < other_end and other < end for other, other_end in done.items()):
                raise ValueError(f"rows of {name!r} were written before, in the bytes {begin}:{end}")
            # Ranges that touch become one, so that a tensor written in order keeps a single one.
            before = next((at for at, stop in done.items() if stop == begin), begin)
            done[before] = done.pop(end, end)

    def _put(self, offset: int, data: memoryview) -> None:
        assert self._file is not None
        position = 0
        while position < data.nbytes:
            part = data[position : position + (1 << 30)]
            position += os.pwrite(self._file.fileno(), part, offset + position)
