"""The plan of an input as plain data: where it is, and its weight files as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dirmerge.planning.inputs import Input, Place


@dataclass(frozen=True)
class FilePlan:
    """A weight file as it was when the merge was planned.

    Attributes:
        path: of the file.
        size: in bytes.
        header: SHA-256 of its tensors' names, dtypes, shapes and places.
    """

    path: str
    size: int
    header: str


@dataclass(frozen=True)
class InputPlan(Place):
    """An input: where it is, and the weight files it is read from.

    Attributes:
        files: the weight files.
        base_name: what an adapter calls its base model.
    """

    files: tuple[FilePlan, ...] = ()
    base_name: str | None = None

    @classmethod
    def of(cls, item: Input) -> InputPlan:
        """Returns the plain data of an opened input."""
        digests: dict[Path, Any] = {}
        for info in item.infos():
            if info.file is not None:
                text = f"{info.name}\0{info.dtype}\0{info.shape}\0{info.offset}\n"
                digests.setdefault(info.file, hashlib.sha256()).update(text.encode())
        files = tuple(
            FilePlan(str(path), path.stat().st_size, digests[path].hexdigest() if path in digests else "")
            for path in item.files
        )
        base_name = item.adapter.base_name if item.adapter is not None else None
        place = item.place
        return cls(place.label, place.kind, place.checkpoint, place.adapter, files, base_name)

    @property
    def adapter_only(self) -> bool:
        """Whether it is an adapter without weights of its own."""
        return self.kind == "adapter"

    @property
    def paths(self) -> list[Path]:
        """The files and folders that must outlive the merge."""
        places = [place for place in (self.checkpoint, self.adapter) if place is not None]
        return [Path(place) for place in places] + [Path(file.path) for file in self.files]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON)."""
        plain = asdict(self)
        return {"source": plain.pop("label"), **plain}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> InputPlan:
        """Returns the input that `to_dict` gave as plain data."""
        files = tuple(FilePlan(**file) for file in plain["files"])
        kept = {key: value for key, value in plain.items() if key not in ("source", "files")}
        return cls(label=plain["source"], files=files, **kept)
