"""The input files of a merge: read in pieces that are hashed as they pass, no byte twice without need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dirmerge.checkpoints.hashing import PassingHash
from dirmerge.checkpoints.safetensors_reader import TensorInfo, locate, read_tensor
from dirmerge.planning import Plan
from dirmerge.planning.inputs import Input


@dataclass(frozen=True)
class Read:
    """Rows of an input's tensor that will be read.

    Attributes:
        item: the input.
        info: the tensor.
        start: first row, None for all.
        stop: row after the last.
        hashed_from: the first byte of the file that the reader feeds to its hash; None where it feeds none.
    """

    item: Input
    info: TensorInfo
    start: int | None = None
    stop: int | None = None
    hashed_from: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        if self.info.file is not None:
            return locate(self.info, self.start, self.stop)[1]
        if self.start is None or self.stop is None:
            return self.info.nbytes
        return (self.stop - self.start) * (self.info.nbytes // max(1, self.info.shape[0]))


class InputFiles:
    """Reads rows of the inputs' tensors and hashes their files.

    Args:
        plan: whose inputs are read.

    Attributes:
        read_bytes: bytes read of each file so far, those for the hash alone included.
    """

    def __init__(self, plan: Plan) -> None:
        sizes = {Path(file.path): file.size for item in plan.inputs for file in item.files}
        self._hashes = {path: PassingHash(path, size) for path, size in sizes.items()}
        infos = (info for item in plan.open().all for info in item.infos())
        self._stamps = {info.file: info.stamp for info in infos}
        self._lock = threading.Lock()
        self.read_bytes = dict.fromkeys(sizes, 0)

    def claim(self, read: Read) -> Read:
        """Returns the read with its place in the order of hashing; called in the order of the reads."""
        info = read.info
        if info.file is None:
            return read
        offset, nbytes, _ = locate(info, read.start, read.stop)
        first = self._hashes[info.file].claim(offset, offset + nbytes)
        return Read(read.item, info, read.start, read.stop, first)

    def read(self, read: Read, into: Tensor | None = None) -> Tensor:
        """Reads the rows, and hashes what the read has claimed.

        Args:
            read: what to read.
            into: bytes to read into; fresh memory by default.

        Raises:
            CheckpointError: as read_tensor.
            InterruptedMergeError: the merge was stopped.
        """
        info = read.info
        if info.file is None:
            checkpoint = read.item.checkpoint
            assert checkpoint is not None  # a state dict
            value = checkpoint.read(info.name, read.start, read.stop)
            if into is None:
                return value
            copy = into[: value.numel() * value.element_size()].view(value.dtype).view(value.shape)
            return copy.copy_(value)
        offset, nbytes, _ = locate(info, read.start, read.stop)
        first, passing = read.hashed_from, self._hashes[info.file]
        if first is None or first >= offset + nbytes:
            value = read_tensor(info, read.start, read.stop, into=into)
            self._count(info.file, nbytes)
            return value
        if first < offset:
            passing.feed_range(first, offset, info.stamp)
            self._count(info.file, offset - first)

        def passed(at: int, piece: memoryview) -> None:
            begin = max(at, first)
            if begin < at + piece.nbytes:
                passing.feed(begin, piece[begin - at :])

        value = read_tensor(info, read.start, read.stop, into=into, passed=passed)
        self._count(info.file, nbytes)
        return value

    def read_again(self, info: TensorInfo, start: int | None = None, stop: int | None = None) -> Tensor:
        """Reads rows of a tensor that lies in a file, for no hash; CheckpointError as read_tensor."""
        assert info.file is not None  # a state dict is not read by its headers
        value = read_tensor(info, start, stop)
        self._count(info.file, value.nbytes)
        return value

    def rest(self) -> Iterable[Callable[[], None]]:
        """Yields what is left to do for the hashes, once all reads are claimed: one action per file."""
        for path, passing in self._hashes.items():
            begin = passing.claim(passing.size, passing.size)

            def finish(path: Path = path, passing: PassingHash = passing, begin: int = begin) -> None:
                if begin < passing.size:
                    passing.feed_range(begin, passing.size, self._stamps.get(path))
                    self._count(path, passing.size - begin)

            yield finish

    def stop(self) -> None:
        """Wakes readers that wait for their turn to hash."""
        for passing in self._hashes.values():
            passing.stop()

    def digests(self) -> dict[str, str]:
        """Returns the hash of every file by its path, once all is read."""
        return {str(path): passing.hexdigest() for path, passing in self._hashes.items()}

    def _count(self, path: Path, nbytes: int) -> None:
        with self._lock:
            self.read_bytes[path] += nbytes
