"""Reading safetensors files with bounded memory and errors that name file and tensor.

The safetensors library is not used, for three reasons:

- it maps whole files, and mapped pages count as resident memory: here only the bytes asked for are read,
  into fresh memory;
- it writes a file from a dictionary that holds every tensor of it: `safetensors_writer` lays out the header
  first and the tensors follow one after the other, in row chunks if need be, so no shard is ever in memory;
- its errors name neither the file nor, mostly, the tensor.

The format (https://huggingface.co/docs/safetensors): an unsigned little-endian 64-bit length, that many
bytes of JSON, and the tensors' bytes, which must cover the rest of the file without gap or overlap.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dirmerge.checkpoints.files import PieceCallback, fill, open_regular, parse_json_object, read_pieces
from dirmerge.errors import CheckpointError

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

METADATA = "__metadata__"
"""The key of the header that is no tensor."""

MAX_HEADER = 100_000_000
"""Bytes of a header at most: the library's own limit."""

_MAX_DIMS = 64
_OWN_PAGES_FROM = 1 << 20
_MAX_INT64 = 2**63 - 1

Shape = tuple[int, ...]


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
    require_little_endian()
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: not a safetensors file: {size} bytes cannot hold a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{path}: not a safetensors file: it claims a header of {length} bytes (the limit is "
                f"{MAX_HEADER})"
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
    metadata = _check_metadata(header.pop(METADATA, {}), path)
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
    pages = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def check_rows(start: int | None, stop: int | None, rows: int, name: str) -> tuple[int, int]:
    """Returns the row range with its defaults filled in; ValueError unless 0 <= start <= stop <= rows."""
    begin, end = 0 if start is None else start, rows if stop is None else stop
    if not 0 <= begin <= end <= rows:
        raise ValueError(f"rows must satisfy 0 <= start <= stop <= {rows} for {name!r}, got {begin}:{end}")
    return begin, end


def require_little_endian() -> None:
    """Raises CheckpointError on a machine whose numbers are big-endian."""
    if sys.byteorder != "little":
        raise CheckpointError(
            "safetensors files are little-endian; this machine is not, which dirmerge does not support"
        )


def _read_exactly(file: io.FileIO, length: int, path: Path) -> bytes:
    buffer = bytearray(length)
    fill(file, memoryview(buffer), f"{path}: header")
    return bytes(buffer)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INT64


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: {METADATA} must map strings to strings")
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
