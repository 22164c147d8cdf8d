"""Frozen heads, logits = head(z M): maps of the features fold into them; they live in files of their own."""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dirmerge.checkpoints.files import read_json_object, write_json
from dirmerge.checkpoints.safetensors_reader import read_header, read_tensor
from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter
from dirmerge.errors import CheckpointError, OutputError

FOLDER = "heads"
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,99}")
_MAX_JSON = 1_000_000


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen head: logits = scale · z weightᵀ + bias, of unit features where `normalise`.

    Attributes:
        weight: (C, d), a linear layer's weight or one vector per class.
        bias: (C,) or None.
        scale: of the products: 1 for a linear layer, CLIP's logit scale for class vectors.
        normalise: whether features are divided by their length first, before any map. Not again after it:
            the class that wins is the same, and the map folds into the weight exactly.
        labels: names of the classes, or empty.

    Raises:
        ValueError: shapes that do not fit, NaN or Inf.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    normalise: bool = False
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
            raise ValueError(f"weight must be a floating matrix (classes, d), got {tuple(weight.shape)}")
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite, got NaN or Inf")
        if not math.isfinite(self.scale) or self.scale <= 0:
            raise ValueError(f"scale must be positive and finite, got {self.scale}")
        if self.labels and len(self.labels) != weight.shape[0]:
            raise ValueError(f"labels must name {weight.shape[0]} classes, got {len(self.labels)}")

    @classmethod
    def of_class_vectors(cls, vectors: Tensor, scale: float = 100.0, labels: tuple[str, ...] = ()) -> Head:
        """Returns CLIP's kind of head: logits = scale · cosine of features and class vectors.

        Args:
            vectors: (C, d), of any length but zero.
            scale: the logit scale, 100 in CLIP.
            labels: names of the classes.
        """
        unit = torch.nn.functional.normalize(vectors.detach().float(), dim=-1)
        return cls(unit, None, scale, True, labels)

    @classmethod
    def of_linear(cls, layer: torch.nn.Module, labels: tuple[str, ...] = ()) -> Head:
        """Returns the head of a linear layer."""
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"layer must be a linear layer, got {type(layer).__name__}")
        # As torch.nn.functional.linear has it; a Conv1D of transformers is the transpose of a linear layer.
        if type(layer).__name__ == "Conv1D":
            weight = weight.T
        bias = bias.detach().clone() if isinstance(bias, Tensor) else None
        return cls(weight.detach().clone(), bias, labels=labels)

    def on(self, device: torch.device) -> Head:
        """Returns the head with its weight and bias on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.weight.shape[0]

    def prepare(self, features: Tensor) -> Tensor:
        """(n, d) the features that maps act on: of unit length where `normalise`."""
        return torch.nn.functional.normalize(features, dim=-1) if self.normalise else features

    def logits(self, z: Tensor) -> Tensor:
        """(n, C) logits of prepared (and perhaps mapped) features."""
        found = self.scale * (z @ self.weight.to(z).T)
        return found if self.bias is None else found + self.bias.to(z)

    def __call__(self, features: Tensor) -> Tensor:
        """(n, C) logits of features as the model gives them."""
        return self.logits(self.prepare(features))

    def folded(self, matrix: Tensor) -> Head:
        """Returns the head that does the map itself: logits of z are those of z M under this head.

        Args:
            matrix: (d, d) M, a rotation or any other linear map of rows.
        """
        weight = (self.weight.double() @ matrix.to(self.weight.device).double().T).to(self.weight.dtype)
        return Head(weight, self.bias, self.scale, self.normalise, self.labels)


@dataclass(frozen=True, eq=False)
class CallableHead:
    """Any function of features as a head; a map stays beside it, because nothing is known of its inside.

    Attributes:
        function: (n, d) features → (n, C) logits.
        matrix: (d, d) the map before it, or None.
    """

    function: Callable[[Tensor], Tensor]
    matrix: Tensor | None = None

    def on(self, device: torch.device) -> CallableHead:
        """Returns the head with its map on a device; the function is the caller's and stays as it is."""
        return CallableHead(self.function, None if self.matrix is None else self.matrix.to(device))

    def prepare(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features

    def logits(self, z: Tensor) -> Tensor:
        """(n, C) logits of (perhaps mapped) features."""
        return self.function(z if self.matrix is None else z @ self.matrix.to(z))

    def __call__(self, features: Tensor) -> Tensor:
        """(n, C) logits of features as the model gives them."""
        return self.logits(features)

    def folded(self, matrix: Tensor) -> CallableHead:
        """Returns the head with the map before it."""
        return CallableHead(self.function, matrix if self.matrix is None else matrix @ self.matrix)


AnyHead: TypeAlias = Head | CallableHead | Callable[[Tensor], Tensor]


def as_head(head: AnyHead) -> Head | CallableHead:
    """Returns the head, a bare function wrapped."""
    return head if isinstance(head, Head | CallableHead) else CallableHead(head)


@dataclass(frozen=True)
class StoredHead:
    """A head as its files hold it.

    Attributes:
        task: the task's name.
        head: the folded head; None where only a map could be stored, for a head that is a function.
        matrix: (d, d) that map: features are multiplied by it before the caller's own head.
        info: what was written beside it: how it was made, how its features are read.
    """

    task: str
    head: Head | None
    matrix: Tensor | None
    info: Mapping[str, Any] = field(default_factory=dict)


def write_head(
    folder: str | Path,
    task: str,
    head: Head | CallableHead,
    info: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes `<task>.safetensors` and `<task>.json`, each complete or not at all.

    Args:
        folder: usually `heads` beside the merged backbone; made if it is missing.
        task: name of the task and of the files: letters, digits, `.`, `-`, `_`.
        head: the folded head; of a CallableHead its map is written, the function is the caller's.
        info: plain data to keep beside it.
        overwrite: whether existing files may be replaced.

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: a name no file should have, or a CallableHead without a map.
        OutputError: the files exist or cannot be written.
    """
    if not _NAME.fullmatch(task):
        raise ValueError(f"a task's name is its file's: letters, digits, '.', '-' and '_', got {task!r}")
    content: dict[str, Any] = {"version": _VERSION, "task": task}
    if isinstance(head, Head):
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        content |= {"kind": "linear", "scale": head.scale, "normalise": head.normalise}
        content["labels"] = list(head.labels)
    elif head.matrix is not None:
        tensors = {"map": head.matrix}
        content["kind"] = "map"
    else:
        raise ValueError(f"task {task}: a function without a map has nothing to store")
    content["info"] = dict(info or {})
    folder = Path(folder)
    target = folder / f"{task}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror or error}") from error
    for path in (target, target.with_suffix(".json")):
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists; choose another folder or allow overwriting")
    write_pair(target, tensors, content)
    return target


def write_pair(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Writes a safetensors file and the JSON beside it; each replaces its predecessor in one step.

    Both hold the same random stamp, so that a reader notices a pair of which only one was replaced.

    Raises:
        OutputError: they cannot be written.
    """
    stamp = secrets.token_hex(8)
    partial = path.with_name(f".{path.name}.{stamp}")
    partial_json = partial.with_name(partial.name + ".json")
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    try:
        with SafetensorsFileWriter(partial, entries, {"format": "pt", "stamp": stamp}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        write_json(partial_json, {**content, "stamp": stamp})
        os.replace(partial, path)
        os.replace(partial_json, path.with_suffix(".json"))
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        for leftover in (partial, partial_json):
            leftover.unlink(missing_ok=True)


def read_pair(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what write_pair wrote.

    Raises:
        CheckpointError: a file that is missing, malformed, hostile, or not of this pair.
    """
    infos, metadata = read_header(path)
    content = read_json_object(path.with_suffix(".json"), _MAX_JSON)
    if content.pop("stamp", None) != metadata.get("stamp"):
        raise CheckpointError(
            f"{path}: is not of one pair with {path.with_suffix('.json').name}: write both again"
        )
    return {name: read_tensor(info) for name, info in infos.items()}, content


def read_head(path: str | Path) -> StoredHead:
    """Reads a head that write_head wrote.

    Args:
        path: the safetensors file; its JSON lies beside it.

    Raises:
        CheckpointError: a file that is missing, malformed, hostile, or holds no head; names file and tensor.
    """
    path = Path(path).expanduser()
    tensors, content = read_pair(path)
    side = path.with_suffix(".json")
    if content.get("version") != _VERSION:
        raise CheckpointError(f"{side}: version must be {_VERSION}, got {content.get('version')!r}")
    task, info = content.get("task"), content.get("info", {})
    if not isinstance(task, str) or not _NAME.fullmatch(task) or not isinstance(info, dict):
        raise CheckpointError(f"{side}: must name its task and hold `info` as an object")
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{path}: tensor {name!r} must be a floating tensor, got {tensor.dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name!r} holds NaN or Inf")
    if content.get("kind") == "map" and tensors.keys() == {"map"}:
        matrix = tensors["map"]
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise CheckpointError(f"{path}: tensor 'map' must be square, got {tuple(matrix.shape)}")
        return StoredHead(task, None, matrix, info)
    if content.get("kind") != "linear" or tensors.keys() - {"bias"} != {"weight"}:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise CheckpointError(f"{path}: must hold a head (weight, bias) or a map, got {found}")
    scale, normalise, labels = content.get("scale"), content.get("normalise"), content.get("labels", [])
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not isinstance(normalise, bool)
        or not isinstance(labels, list)
        or not all(isinstance(label, str) for label in labels)
    ):
        raise CheckpointError(f"{side}: needs a number `scale`, a boolean `normalise` and strings `labels`")
    try:
        head = Head(tensors["weight"], tensors.get("bias"), float(scale), normalise, tuple(labels))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return StoredHead(task, head, None, info)


def read_heads(folder: str | Path) -> dict[str, StoredHead]:
    """Reads every head of a folder, by task; the folder is that of the heads or of the merged model.

    Raises:
        CheckpointError: no head is there, or one cannot be read.
    """
    folder = Path(folder).expanduser()
    inner = folder / FOLDER
    chosen = inner if inner.is_dir() else folder
    paths = sorted(chosen.glob("*.json")) if chosen.is_dir() else []
    paths = [path for path in paths if path.with_suffix(".safetensors").is_file()]
    if not paths:
        raise CheckpointError(f"{chosen}: holds no heads (<task>.safetensors and <task>.json)")
    heads = [read_head(path.with_suffix(".safetensors")) for path in paths]
    for path, stored in zip(paths, heads, strict=True):
        if stored.task != path.stem:
            raise CheckpointError(f"{path}: must be the head of task {path.stem!r}, names {stored.task!r}")
    return {stored.task: stored for stored in heads}
