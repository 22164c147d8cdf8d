"""An output folder that appears complete or not at all.

Nothing is written into the output folder itself: all goes to a hidden sibling, which is renamed at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from dirmerge.checkpoints.files import read_json_object
from dirmerge.errors import CheckpointError, OutputError

MANIFEST = "dirmerge.json"
"""The manifest that every folder written by dirmerge holds; without it a folder is not replaced."""

_LOCK = ".dirmerge-lock"


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
        except BaseException as error:  # also an interrupt
            self._discard()
            if not isinstance(error, OSError) or isinstance(error, OutputError):
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
            except BaseException:
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
