"""Reading and writing safetensors files with bounded memory and errors that name file and tensor.

The safetensors library is not used, for three reasons:

- it maps whole files, and mapped pages count as resident memory: here only the bytes asked for are read,
  into fresh memory;
- it writes a file from a dictionary that holds every tensor of it: here the header is laid out first and the
  tensors follow
  one after the other, in row chunks if need be, so no shard is ever in memory;
- its errors name neither the file nor, mostly, the tensor.

The format (https://huggingface.co/docs/safetensors): an unsigned little-endian 64-bit length, that many
bytes of JSON, and the
tensors' bytes, which must cover the rest of the file without gap or overlap.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import stat
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dirmerge.errors import CheckpointError, OutputError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtype names of the format that torch can hold."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_DIMS = 64
_OWN_PAGES_FROM = 1 << 20
_MAX_INT64 = 2**63 - 1

PIECE = 8 << 20
"""Bytes of a piece in which files are read: large enough for any disk, small enough for a CPU's cache."""

Shape = tuple[int, ...]
PieceCallback = Callable[[int, memoryview], None]
Entry = tuple[str, torch.dtype, Sequence[int]]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Args:
        name: its name in the checkpoint.
        dtype: its dtype.
        shape: its shape.
        file: the safetensors file; None for a tensor of a state dict.
        offset: first byte in the file.
        nbytes: number of bytes.
        stamp: (size, modification time) of the file when its header was read, so that a later change is
            noticed.
    """

    name: str
    dtype: torch.dtype
    shape: Shape
    file: Path | None
    offset: int
    nbytes: int
    stamp: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


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


def read_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of a safetensors file; no tensor is read.

    Args:
        path: the file.

    Returns:
        The tensors by name in the order of their bytes, and the metadata.

    Raises:
        CheckpointError: for a file that is truncated, malformed or lies about its content; names file and
            tensor.
    """
    path = Path(path)
    _require_little_endian()
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: not a safetensors file: {size} bytes cannot hold a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: not a safetensors file: it claims a header of {length} bytes (the limit is "
                f"{_MAX_HEADER})"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated: it claims a header of {length} bytes, only {size - 8} follow"
            )
        raw = _read_exactly(file, length, path)
    # A file that starts with anything else than an object (padding may follow it, never precede it) is no
    # safetensors file.
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    header = parse_json_object(raw, str(path))
    metadata = _check_metadata(header.pop(_METADATA, {}), path)
    stamp = (size, status.st_mtime_ns)
    start = 8 + length
    tensors = [_check_entry(name, entry, path, start, size, stamp) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.offset + info.nbytes))
    position, previous = start, ""
    for info in tensors:
        if info.offset != position:
            relation = "overlaps" if info.offset < position else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor {info.name!r} {relation} {previous or 'the header'!r}")
        position, previous = info.offset + info.nbytes, info.name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to none")
    return {info.name: info for info in tensors}, metadata


def locate(info: TensorInfo, start: int | None, stop: int | None) -> tuple[int, int, Shape]:
    """Returns the first byte, the number of bytes and the shape of a tensor, or of its rows start:stop.

    Raises:
        ValueError: for rows out of range, rows of a scalar, or a tensor of a state dict.
    """
    if info.file is None:
        raise ValueError(f"{info.name!r} is a tensor of a state dict, not of a file")
    if start is None and stop is None:
        return info.offset, info.nbytes, info.shape
    if not info.shape:
        raise ValueError(f"{info.name!r} is a scalar: it has no rows")
    begin, end = check_rows(start, stop, info.shape[0], info.name)
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    return info.offset + begin * row_bytes, (end - begin) * row_bytes, (end - begin, *info.shape[1:])


def read_tensor(
    info: TensorInfo,
    start: int | None = None,
    stop: int | None = None,
    *,
    into: Tensor | None = None,
    passed: PieceCallback | None = None,
) -> Tensor:
    """Reads a tensor, or its rows start:stop along dimension 0.

    Args:
        info: from read_header.
        start: first row, 0 by default.
        stop: row after the last, shape[0] by default.
        into: bytes (uint8) to read into, at least as many as are read; fresh memory by default.
        passed: called with the offset in the file and the bytes of every piece that was read, in order.

    Returns:
        A contiguous tensor on the CPU in the stored dtype, in fresh memory or a view of `into`.

    Raises:
        CheckpointError: if the file is gone, was changed since its header was read, or holds a byte that is
            no boolean.
        ValueError: for rows out of range, or rows of a scalar.
    """
    offset, nbytes, shape = locate(info, start, stop)
    assert info.file is not None  # locate() refuses it
    raw = fresh_bytes(nbytes) if into is None else into[:nbytes]
    data = raw.numpy().data
    read_pieces(
        info.file,
        info.stamp,
        offset,
        offset + nbytes,
        lambda at, size: data[at - offset : at - offset + size],
        passed,
        f"tensor {info.name!r}",
    )
    if info.dtype == torch.bool and bool((raw > 1).any()):
        raise CheckpointError(f"{info.file}: tensor {info.name!r} holds bytes that are no booleans")
    return raw.view(info.dtype).view(shape)


def fresh_bytes(nbytes: int) -> Tensor:
    """Returns memory (uint8) that goes back to the system when the tensor is gone.

    Of what is freed, the C library keeps blocks of up to 32 MB per thread for the next who asks.
    """
    if nbytes < _OWN_PAGES_FROM:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


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


def check_rows(start: int | None, stop: int | None, rows: int, name: str) -> tuple[int, int]:
    """Returns the row range with its defaults filled in; ValueError unless 0 <= start <= stop <= rows."""
    begin, end = 0 if start is None else start, rows if stop is None else stop
    if not 0 <= begin <= end <= rows:
        raise ValueError(f"rows must satisfy 0 <= start <= stop <= {rows} for {name!r}, got {begin}:{end}")
    return begin, end


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
        _require_little_endian()
        self.path = Path(path)
        planned: dict[str, tuple[torch.dtype, Shape]] = {}
        for name, dtype, shape in entries:
            if name in planned or name == _METADATA:
                raise ValueError(f"tensor names must be unique and not {_METADATA}, got {name!r} again")
            if dtype not in _NAMES:
                raise ValueError(f"safetensors cannot store {dtype} (tensor {name!r})")
            planned[name] = (dtype, tuple(int(size) for size in shape))
        header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
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
        if len(raw) > _MAX_HEADER:
            raise ValueError(
                f"the header must have at most {_MAX_HEADER} bytes, got {len(raw)}: write more shards"
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


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise CheckpointError(
            "safetensors files are little-endian; this machine is not, which dirmerge does not support"
        )


def _read_exactly(file: io.FileIO, length: int, path: Path) -> bytes:
    buffer = bytearray(length)
    fill(file, memoryview(buffer), f"{path}: header")
    return bytes(buffer)


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


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INT64


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: {_METADATA} must map strings to strings")
    return value


def _check_entry(
    name: str, entry: object, path: Path, start: int, size: int, stamp: tuple[int, int]
) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} has a name that is not valid Unicode") from None
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly the keys dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{where} has the dtype {dtype_name!r}, which is not supported")
    dtype = DTYPES[dtype_name]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_size, shape)):
        raise CheckpointError(
            f"{where} must have a shape of at most {_MAX_DIMS} non-negative 64-bit integers"
        )
    # torch computes strides from the sizes even when one of them is 0
    if math.prod([max(length, 1) for length in shape]) * dtype.itemsize > _MAX_INT64:
        raise CheckpointError(f"{where} claims the shape {shape}, which no memory can hold")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where} must have two non-negative data_offsets")
    begin, end = offsets
    if end < begin or start + end > size:
        raise CheckpointError(f"{where} claims the bytes {begin}:{end} of {size - start}")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where} of shape {shape} and dtype {dtype_name} needs {nbytes} bytes, has {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes, stamp)
