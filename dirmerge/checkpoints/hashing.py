"""BLAKE3 of files whose bytes pass anyway: pieces are hashed as they are read, in the order of the file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from dirmerge.checkpoints.files import PIECE, open_regular, read_pieces

HASH = "blake3"
"""The name of the hash in manifests; `b3sum` computes the same."""

ALGORITHMS: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
"""The hashes that manifests of any version hold."""


class InterruptedMergeError(RuntimeError):
    """The merge was stopped by an error elsewhere."""


class PassingHash:
    """The hash of one file from pieces that several threads read.

    Spans of the file are claimed in the order in which they will be read, and fed by the readers, who wait
    for each other so that the hash sees the bytes in their order. A claim tells its reader which bytes to
    feed: those of the span that no earlier claim covers, and before them those of a gap that nobody has
    claimed. A byte that was passed over is thereby read for the hash alone, at once, and again if it is
    asked for later.

    Args:
        path: the file.
        size: of the file.
        algorithm: one of ALGORITHMS.
    """

    def __init__(self, path: Path, size: int, algorithm: str = HASH) -> None:
        self.path = path
        self.size = size
        self._hash = ALGORITHMS[algorithm]()
        self._claimed = 0
        self._position = 0
        self._stopped = False
        self._turn = threading.Condition()

    def claim(self, begin: int, end: int) -> int:
        """Claims a span, before it is read; not thread-safe.

        Returns:
            The first byte that its reader must feed, up to `end`: before `begin` where there is a gap,
            `end` where all of it was claimed before.
        """
        first = self._claimed
        if first >= end:
            return end
        self._claimed = end
        return min(first, end)

    def feed(self, offset: int, data: memoryview) -> None:
        """Takes the piece at an offset, after waiting for the pieces before it.

        Raises:
            InterruptedMergeError: stop() was called meanwhile.
        """
        with self._turn:
            while self._position != offset and not self._stopped:
                self._turn.wait()
            if self._stopped:
                raise InterruptedMergeError
        # Only the thread whose turn it is comes here.
        self._hash.update(data)
        with self._turn:
            self._position += data.nbytes
            self._turn.notify_all()

    def feed_range(self, begin: int, end: int, stamp: tuple[int, int] | None) -> None:
        """Reads a range of the file for the hash alone.

        Raises:
            CheckpointError: it cannot be read, or has changed since its header was read.
        """
        buffer = memoryview(bytearray(min(PIECE, max(0, end - begin))))
        read_pieces(self.path, stamp, begin, end, lambda at, size: buffer[:size], self.feed)

    def stop(self) -> None:
        """Wakes all that wait; they raise InterruptedMergeError."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def hexdigest(self) -> str:
        """Returns the hash, once every byte was fed."""
        assert self._position == self.size, f"{self.path}: {self._position} of {self.size} bytes were hashed"
        return str(self._hash.hexdigest())


def hash_file(path: str | Path, algorithm: str = HASH) -> str:
    """Computes the hash of a file, a piece in memory at a time.

    Args:
        path: the file.
        algorithm: one of ALGORITHMS.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = Path(path)
    with open_regular(path) as file:
        file.seek(0, 2)
        size = file.tell()
    passing = PassingHash(path, size, algorithm)
    passing.feed_range(passing.claim(0, size), size, None)
    return passing.hexdigest()
