"""PEFT LoRA adapters, read exactly as PEFT means them.

An adapter changes the weight of a module by ΔW = c · B A (transposed where the module stores its weight as
(in, out)), with c = alpha / r, or alpha / √r with rsLoRA. Both factors stay factored: ΔW is never formed
here.

What cannot be reproduced from the two files alone is refused, never approximated: DoRA and the other
variants, initialisations that changed the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), LoRA on
convolutions and on fused expert parameters, and every option and key that is not known.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dirmerge.checkpoints.adapter_config import (
    MERGE_FIRST,
    PREFIX,
    REFUSED,
    check_config,
    module_value,
    refused,
)
from dirmerge.checkpoints.files import read_json_object
from dirmerge.checkpoints.reader import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, pickle_error
from dirmerge.checkpoints.safetensors_reader import TensorInfo, read_header, read_tensor
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import CheckpointError, MismatchError, NonFiniteError
from dirmerge.linalg import all_finite

Kind = Literal["linear", "conv1d", "embedding"]
"""How a module stores its weight: (out, in), transformers' Conv1D (in, out), or an embedding (count, dim)."""

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<leaf>weight|bias)")
# Parts of names that PEFT inserts: whatever the known cases leave of them is of an unknown kind.
_RESERVED = re.compile(r"(^|\.)(lora_\w*|base_layer|modules_to_save|original_module|token_adapter)(\.|$)")


ReadRows = Callable[[TensorInfo, int | None, int | None], Tensor]


@dataclass(frozen=True)
class AdapterTarget:
    """The low-rank update of one weight.

    Args:
        name: the weight tensor of the base model, "<module>.weight".
        module: the module's name.
        kind: how the module stores its weight.
        rank: r.
        scaling: c in ΔW = c · B A.
        a: lora_A, (r, in).
        b: lora_B, (out, r).
    """

    name: str
    module: str
    kind: Kind
    rank: int
    scaling: float
    a: TensorInfo
    b: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the weight it changes."""
        out, size = self.b.shape[0], self.a.shape[1]
        return (out, size) if self.kind == "linear" else (size, out)

    def read(self, read: ReadRows = read_tensor, device: torch.device | None = None) -> LowRank:
        """Reads the update as left · rightᵀ.

        Args:
            read: reads rows of a tensor that lies in a file.
            device: where the factors are widened and scaled; the CPU by default.

        Returns:
            LowRank of rank r without core, float32 (float64 where a factor is stored so), the scaling
            multiplied in.

        Raises:
            NonFiniteError: for NaN or Inf, with file and tensor.
            CheckpointError: if the file cannot be read any more.
        """
        a, b = (_finite(info, read(info, None, None).to(device or "cpu")) for info in (self.a, self.b))
        update = LowRank.from_lora(b, a, self.scaling)
        return update if self.kind == "linear" else update.T


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, known by its headers.

    Args:
        path: its folder.
        config: the content of adapter_config.json.
        base_name: what it calls its base model; None if it does not say.
        targets: module name to update.
        saved: full tensors that replace those of the base model (modules_to_save, biases, resized
            embeddings), by the name they have there.
        base_copies: copies of base weights that PEFT stores beside an embedding's factors; see
            check_base_copies.
        files: the two files.
    """

    path: Path
    config: dict[str, Any]
    base_name: str | None
    targets: dict[str, AdapterTarget]
    saved: dict[str, TensorInfo]
    base_copies: dict[str, TensorInfo]
    files: list[Path]

    def orient(self, shapes: Mapping[str, Sequence[int]]) -> Adapter:
        """Corrects how the targets store their weights, by the shapes of the base model.

        PEFT decides by the module's class and keeps one flag for the whole adapter (the last module's), so
        the flag is wrong for some modules of a model that has both kinds, such as GPT-2 with its lm_head. A
        shape decides for every matrix that is not square; square ones follow the others.

        Args:
            shapes: tensor name to shape in the base model; targets that are not in it stay as they are.

        Returns:
            The adapter with corrected targets.

        Raises:
            MismatchError: for shapes that fit neither way, and for square matrices of an adapter that has
            both kinds; lists all.
        """
        problems: list[str] = []
        kinds: dict[str, Kind] = {}
        for module, target in self.targets.items():
            shape = tuple(shapes.get(target.name, target.shape))
            if shape == target.shape[::-1] and target.kind != "embedding":
                if shape != target.shape:
                    kinds[module] = "conv1d" if target.kind == "linear" else "linear"
            elif shape != target.shape:
                problems.append(
                    f"{target.name}: the adapter changes a {target.shape} weight, the base model has {shape}"
                )
            elif target.kind != "embedding" and target.name in shapes:
                kinds[module] = target.kind
        seen = set(kinds.values())
        square = [
            module
            for module, target in self.targets.items()
            if target.kind != "embedding" and target.shape[0] == target.shape[1] and target.name in shapes
        ]
        if len(seen) == 2:
            problems += [
                f"{module}: is square, and the adapter has modules of both orientations: which it has "
                "cannot be told"
                for module in square
            ]
        elif seen:
            kinds.update(dict.fromkeys(square, next(iter(seen))))
        if problems:
            raise MismatchError(
                f"{self.path} does not fit the base model:\n" + "\n".join(f"- {text}" for text in problems)
            )
        targets = {
            module: dataclasses.replace(target, kind=kinds.get(module, target.kind))
            for module, target in self.targets.items()
        }
        return dataclasses.replace(self, targets=targets)

    def check_base_copies(self, base: Checkpoint, max_bytes: int = 1 << 26) -> None:
        """Checks that the base weights stored in the adapter are those of the base model, up to rounding.

        PEFT stores the whole embedding beside the factors of an embedding adapter. It carries no information
        unless the vocabulary was resized or the adapter was trained on another base.

        Args:
            base: the base model.
            max_bytes: how much of a tensor to read at once.

        Raises:
            MismatchError: if a copy differs.
        """
        for name, info in self.base_copies.items():
            other = base.tensors.get(name)
            if other is None or other.shape != info.shape:
                found = "no such tensor" if other is None else f"shape {other.shape}"
                raise MismatchError(
                    f"{info.file}: holds {name!r} of shape {info.shape}, the base model {base.source} has "
                    f"{found}: was the vocabulary resized?"
                )
            rows = max(1, max_bytes // max(1, info.nbytes // max(1, info.shape[0])))
            for start in range(0, info.shape[0], rows):
                stop = min(start + rows, info.shape[0])
                mine, theirs = read_tensor(info, start, stop), base.read(name, start, stop)
                if not (
                    torch.equal(mine, theirs.to(mine.dtype)) or torch.equal(mine.to(theirs.dtype), theirs)
                ):
                    raise MismatchError(
                        f"{info.file}: holds values of {name!r} that differ from those of {base.source}: "
                        "it was trained on another base"
                    )


def is_adapter(path: str | Path) -> bool:
    """Whether path is a folder with an adapter_config.json."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def open_adapter(path: str | Path) -> Adapter:
    """Opens a PEFT LoRA adapter without reading a weight.

    Args:
        path: its folder (adapter_config.json and adapter_model.safetensors).

    Returns:
        The adapter.

    Raises:
        CheckpointError: for malformed files, ranks that contradict the configuration, and everything that is
            not plain LoRA; says what to do.
    """
    path = Path(path)
    config_path, weights_path = path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS
    if not config_path.is_file():
        raise CheckpointError(f"{path}: has no {ADAPTER_CONFIG}: not a PEFT adapter")
    config = read_json_object(config_path)
    check_config(config, config_path)
    if not weights_path.is_file():
        pickles = [file for file in (path / "adapter_model.bin", path / "adapter_model.pt") if file.is_file()]
        if pickles:
            raise pickle_error(path, pickles)
        raise CheckpointError(f"{path}: has no {ADAPTER_WEIGHTS}")
    factors: dict[str, dict[str, TensorInfo]] = {}
    embeddings: set[str] = set()
    saved: dict[str, TensorInfo] = {}
    copies: dict[str, TensorInfo] = {}
    for key, info in read_header(weights_path)[0].items():
        where = f"{weights_path}: tensor {key!r}"
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{where} must start with {PREFIX!r}, as PEFT writes it")
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match and not _RESERVED.search(match["module"]):
            if match["embedding"]:
                embeddings.add(match["module"])
            side = factors.setdefault(match["module"], {})
            letter = match["linear"] or match["embedding"]
            if letter in side:
                raise CheckpointError(f"{where}: the module has two kinds of factors")
            side[letter] = info
        elif name.endswith(".lora_B.bias"):
            raise refused(config_path, REFUSED["lora_bias"])
        elif ".lora_magnitude_vector" in name:
            raise refused(config_path, REFUSED["use_dora"])
        elif (base := _BASE_LAYER.fullmatch(name)) and not _RESERVED.search(base["module"]):
            full, into = f"{base['module']}.{base['leaf']}", copies if base["leaf"] == "weight" else saved
            if full in into:
                raise CheckpointError(f"{where} appears twice: with and without `.base_layer`")
            into[full] = info
        elif _RESERVED.search(name):
            raise CheckpointError(f"{where} is of a kind that dirmerge does not know; {MERGE_FIRST}")
        elif name in saved:
            raise CheckpointError(f"{where} appears twice: with and without `.base_layer`")
        else:
            saved[name] = info
    if not factors and not saved:
        raise CheckpointError(f"{weights_path}: holds no LoRA weight")
    targets = {
        module: _target(module, side, module in embeddings, config, weights_path)
        for module, side in factors.items()
    }
    for name in copies:
        if name.removesuffix(".weight") not in targets:
            raise CheckpointError(f"{weights_path}: holds the base weight {name!r}, but no factors for it")
    for target in targets.values():
        if target.name in saved:
            raise CheckpointError(f"{weights_path}: holds both factors and a full tensor for {target.name!r}")
    base_name = config.get("base_model_name_or_path") or None
    return Adapter(path, config, base_name, targets, saved, copies, [config_path, weights_path])


def _finite(info: TensorInfo, tensor: Tensor) -> Tensor:
    if not all_finite(tensor):
        raise NonFiniteError(f"{info.file}: tensor {info.name!r} holds NaN or Inf")
    return tensor


def _target(
    module: str, side: dict[str, TensorInfo], embedding: bool, config: dict[str, Any], path: Path
) -> AdapterTarget:
    where = f"{path}: module {module!r}"
    if side.keys() != {"A", "B"}:
        raise CheckpointError(f"{where} has only the factor {next(iter(side))} of A and B")
    a, b = side["A"], side["B"]
    for info in (a, b):
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{where}: factors must be floating-point, got {info.dtype}")
        if info.numel == 0:
            raise CheckpointError(
                f"{where}: has a factor without elements, as DeepSpeed ZeRO-3 leaves it when the weights "
                "are not gathered before saving"
            )
        if len(info.shape) != 2:
            raise CheckpointError(
                f"{where}: is LoRA on a convolution (factor of shape {info.shape}), not on a matrix; "
                f"{MERGE_FIRST}"
            )
    rank = module_value(config, "rank_pattern", "r", module)
    alpha = module_value(config, "alpha_pattern", "lora_alpha", module)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{where}: the rank must be a positive integer, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise CheckpointError(f"{where}: lora_alpha must be a finite number, got {alpha!r}")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{where}: its configuration says rank {rank}, its factors are A {a.shape} and B {b.shape}"
        )
    kind: Kind = "embedding" if embedding else "conv1d" if config.get("fan_in_fan_out") else "linear"
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return AdapterTarget(f"{module}.weight", module, kind, rank, scaling, a, b)
