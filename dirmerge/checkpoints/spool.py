"""Temporary storage of matrices between two passes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dirmerge.checkpoints.files import fill
from dirmerge.checkpoints.safetensors_writer import tensor_bytes
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import OutputError


class Spool:
    """Temporary storage of matrices between two passes.

    The file has no name and vanishes with the process; one matrix at a time is in memory.

    Args:
        folder: on whose file system the file is, e.g. the path of an OutputFolder.

    Raises:
        OutputError: if the file cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._items: dict[str, list[tuple[int, torch.dtype, tuple[int, ...]] | None]] = {}
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  (close())
        except OSError as error:
            raise OutputError(f"{folder}: cannot hold temporary files: {error.strerror or error}") from error

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def put(self, name: str, value: LowRank | Tensor) -> None:
        """Stores a matrix, dense or factored, in its own dtype; ValueError for a name that is there."""
        if name in self._items:
            raise ValueError(f"{name!r} is in the spool")
        parts = (value.left, value.core, value.right) if isinstance(value, LowRank) else (value,)
        self._items[name] = [None if part is None else self._append(part) for part in parts]

    def get(self, name: str) -> LowRank | Tensor:
        """Reads what put() stored, into fresh memory; KeyError for an unknown name."""
        parts = [None if item is None else self._load(name, *item) for item in self._items[name]]
        if len(parts) == 1:
            assert parts[0] is not None
            return parts[0]
        left, core, right = parts
        assert left is not None
        assert right is not None
        return LowRank(left, core, right)

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._items = {}

    def _append(self, tensor: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
        offset, data = self._end, tensor_bytes(tensor)
        try:
            self._file.seek(offset)
            position = 0
            while position < data.nbytes:
                position += self._file.write(data[position : position + (1 << 30)])
        except OSError as error:
            raise OutputError(f"{self._folder}: temporary data cannot be written: {error}") from error
        self._end += data.nbytes
        return offset, tensor.dtype, tuple(tensor.shape)

    def _load(self, name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        result = torch.empty(shape, dtype=dtype)
        self._file.seek(offset)
        fill(self._file, tensor_bytes(result), f"{self._folder}: temporary tensor {name!r}")
        return result
