"""PEFT LoRA adapters, read and written exactly as PEFT means them.

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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from dirmerge.checkpoints.reader import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, pickle_error
from dirmerge.checkpoints.safetensors_io import (
    Entry,
    SafetensorsFileWriter,
    TensorInfo,
    read_header,
    read_json_object,
    read_tensor,
    write_json,
)
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import CheckpointError, MismatchError, NonFiniteError
from dirmerge.linalg import all_finite

Kind = Literal["linear", "conv1d", "embedding"]
"""How a module stores its weight: (out, in), transformers' Conv1D (in, out), or an embedding (count, dim)."""

_PREFIX = "base_model.model."
# Options that say how an adapter was trained or where it was put; the tensors say all that matters of it.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "alpha_pattern", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Options under which the weight is not W + c·B A: name to what it is called.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "ensure_weight_tying": "LoRA on tied weights (ensure_weight_tying)",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on lora_B (lora_bias)",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on parameters such as fused experts (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
_MERGE_FIRST = (
    "merge it into its base model with PEFT (merge_and_unload, then save_pretrained) and give that full "
    "model instead"
)
# Initialisations that leave the base weights as they are.
_PLAIN_INITS = {"eva", "gaussian", "mica", "orthogonal"}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<leaf>weight|bias)")
# Parts of names that PEFT inserts: what is left of them after the known cases has a meaning we do not know.
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
    _check_config(config, config_path)
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
        if not key.startswith(_PREFIX):
            raise CheckpointError(f"{where} must start with {_PREFIX!r}, as PEFT writes it")
        name = key.removeprefix(_PREFIX)
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
            raise _refused(config_path, _REFUSED["lora_bias"])
        elif ".lora_magnitude_vector" in name:
            raise _refused(config_path, _REFUSED["use_dora"])
        elif (base := _BASE_LAYER.fullmatch(name)) and not _RESERVED.search(base["module"]):
            full, into = f"{base['module']}.{base['leaf']}", copies if base["leaf"] == "weight" else saved
            if full in into:
                raise CheckpointError(f"{where} is there twice, with and without .base_layer")
            into[full] = info
        elif _RESERVED.search(name):
            raise CheckpointError(f"{where} has a meaning that dirmerge does not know; {_MERGE_FIRST}")
        elif name in saved:
            raise CheckpointError(f"{where} is there twice, with and without .base_layer")
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


@dataclass(frozen=True)
class AdapterModule:
    """A module of an adapter to be written.

    Args:
        name: the module, without ".weight".
        shape: (m, n) of the weight that it changes, as the base model stores it.
        rank: the rank to reserve; smaller updates are padded with zeros.
        kind: how the module stores its weight.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    kind: Kind = "linear"


class AdapterWriter:
    """Writes a PEFT adapter module by module: one update in memory at a time.

    The scaling is 1 for every module (alpha = r), so that PEFT's ΔW is the product of the factors, without
    rsLoRA.

    Args:
        folder: where the two files go; created if missing.
        modules: what will be written.
        base_name: the base model's name or path for the configuration.
        full: (name, dtype, shape) of full tensors (modules_to_save, biases), by their names in the base
            model.
        dtype: dtype of the factors.
        task_type: PEFT's task type. Those with a head (SEQ_CLS, TOKEN_CLS, QUESTION_ANS) are left out if no
            full tensor is written, since PEFT would then look for the head in the file.
        metadata: strings for the safetensors header.

    Raises:
        ValueError: for no modules, ranks below 1, repeated names, or full tensors that PEFT cannot express.
        OutputError: if a file exists or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        modules: Sequence[AdapterModule],
        *,
        base_name: str | None = None,
        full: Sequence[Entry] = (),
        dtype: torch.dtype = torch.float32,
        task_type: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._modules = {module.name: module for module in modules}
        self._dtype = dtype
        if not modules or len(self._modules) != len(modules):
            raise ValueError("modules must not be empty, and their names must be unique")
        for module in modules:
            if module.rank < 1:
                raise ValueError(f"rank must be at least 1, got {module.rank} for {module.name!r}")
        self._full = {name: self._full_key(name) for name, _, _ in full}
        config = self._config(base_name, task_type)
        entries: list[Entry] = []
        for module in modules:
            key_a, key_b = _keys(module)
            out, size = module.shape if module.kind == "linear" else module.shape[::-1]
            entries += [(key_a, dtype, (module.rank, size)), (key_b, dtype, (out, module.rank))]
        entries += [(self._full[name], full_dtype, shape) for name, full_dtype, shape in full]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = SafetensorsFileWriter(
            self.folder / ADAPTER_WEIGHTS, entries, metadata or {"format": "pt"}
        )
        write_json(self.folder / ADAPTER_CONFIG, config)

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.abort()

    def write(self, module: str, update: LowRank) -> None:
        """Writes the update of one module.

        Args:
            module: its name.
            update: (m, n) as the base model stores the weight, of at most the planned rank.

        Raises:
            ValueError: for an unknown module, another shape or a larger rank than planned.
            NonFiniteError: if a factor is not finite, or not in the output's dtype.
        """
        if module not in self._modules:
            raise ValueError(f"{module!r} is not a planned module of {self.folder}")
        planned = self._modules[module]
        if update.shape != planned.shape or update.rank > planned.rank:
            raise ValueError(
                f"the update of {module!r} must have shape {planned.shape} and rank at most "
                f"{planned.rank}, got {update.shape} and {update.rank}"
            )
        left, right = update.folded()
        b, a = (left, right) if planned.kind == "linear" else (right, left)
        for key, factor in zip(_keys(planned), (a, b), strict=True):
            stored = factor.to(self._dtype)
            if update.rank < planned.rank:
                stored = torch.nn.functional.pad(stored, (0, planned.rank - update.rank))
            if not all_finite(stored):
                raise NonFiniteError(f"{self._file.path}: tensor {key!r} is not finite in {self._dtype}")
            self._file.write(key, stored.mT if factor is a else stored)

    def write_full(self, name: str, tensor: Tensor, start: int | None = None) -> None:
        """Writes a full tensor, or its rows from `start` on; see SafetensorsFileWriter.write."""
        if name not in self._full:
            raise ValueError(f"{name!r} is not a planned full tensor of {self.folder}")
        self._file.write(self._full[name], tensor, start)

    def close(self) -> None:
        """Checks that everything planned was written, and flushes it to the disk."""
        self._file.close()

    def _full_key(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if not module:
            raise ValueError(f"{name!r} belongs to no module, so PEFT cannot save it in an adapter")
        if module not in self._modules:
            return _PREFIX + name
        if leaf != "bias":
            raise ValueError(f"{name!r} cannot be written in full: its module {module!r} has an update")
        return f"{_PREFIX}{module}.base_layer.bias"

    def _config(self, base_name: str | None, task_type: str | None) -> dict[str, Any]:
        ranks = Counter(module.rank for module in self._modules.values())
        common = min(ranks, key=lambda rank: (-ranks[rank], rank))
        # One pattern per rank: PEFT tries every pattern on every module. It matches (.*\.)?(pattern)$, so
        # the ^ makes the name whole.
        pattern = {
            "^(?:"
            + "|".join(re.escape(name) for name, module in self._modules.items() if module.rank == rank)
            + ")": rank
            for rank in sorted(ranks)
            if rank != common
        }
        saved = {name.rpartition(".")[0] for name in self._full if not name.endswith(".bias")}
        biases = {name.rpartition(".")[0] for name in self._full if name.endswith(".bias")} - saved
        heads = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
        return {
            "alpha_pattern": pattern,
            "base_model_name_or_path": base_name,
            "bias": "none" if not biases else "lora_only" if biases <= self._modules.keys() else "all",
            "fan_in_fan_out": any(module.kind == "conv1d" for module in self._modules.values()),
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "modules_to_save": sorted(saved) or None,
            "peft_type": "LORA",
            "r": common,
            "rank_pattern": pattern,
            "target_modules": sorted(self._modules),
            "task_type": None if task_type in heads and not saved else task_type,
            "use_dora": False,
            "use_rslora": False,
        }


def write_adapter(
    folder: str | Path,
    modules: Sequence[AdapterModule],
    updates: Iterable[tuple[str, LowRank]],
    **options: Any,
) -> None:
    """Writes a PEFT adapter from a stream of updates.

    Args:
        folder: where the two files go.
        modules: what `updates` will bring.
        updates: (module name, update), in any order.
        **options: keyword arguments of AdapterWriter.

    Raises:
        ValueError: if the updates are not those planned.
        OutputError: if a file exists or cannot be written.
    """
    with AdapterWriter(folder, modules, **options) as writer:
        for module, update in updates:
            writer.write(module, update)


def _keys(module: AdapterModule) -> tuple[str, str]:
    """Returns the names of A and B in the file."""
    if module.kind == "embedding":
        return f"{_PREFIX}{module.name}.lora_embedding_A", f"{_PREFIX}{module.name}.lora_embedding_B"
    return f"{_PREFIX}{module.name}.lora_A.weight", f"{_PREFIX}{module.name}.lora_B.weight"


def _finite(info: TensorInfo, tensor: Tensor) -> Tensor:
    if not all_finite(tensor):
        raise NonFiniteError(f"{info.file}: tensor {info.name!r} holds NaN or Inf")
    return tensor


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: uses {what}, which is not a plain low-rank update; {_MERGE_FIRST}")


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raises unless the options mean plain LoRA."""
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise CheckpointError(f"{path}: peft_type must be LORA, got {kind!r}; {_MERGE_FIRST}")
    for name, value in config.items():
        if name in _HARMLESS or not value:
            continue
        if name in _REFUSED:
            raise _refused(path, _REFUSED[name])
        raise CheckpointError(
            f"{path}: has the option {name} = {value!r}, which dirmerge does not know (adapter of a newer "
            f"PEFT?); {_MERGE_FIRST}"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise CheckpointError(
            f"{path}: was initialised by {init!r}, which changes the base weights, so its factors are no "
            "update of the original base. Convert it with PEFT (save_pretrained with "
            f"path_initial_model_for_weight_conversion), or {_MERGE_FIRST}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {name} must be an object")
        for pattern in patterns:
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, OverflowError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}: {name} has the invalid pattern {pattern!r}: {error}"
                ) from error
    for name in ("use_rslora", "fan_in_fan_out"):
        if config.get(name) not in (None, True, False):
            raise CheckpointError(f"{path}: {name} must be true or false, got {config[name]!r}")
    base_name = config.get("base_model_name_or_path")
    if base_name is not None and not isinstance(base_name, str):
        raise CheckpointError(f"{path}: base_model_name_or_path must be a string")


def _lookup(config: dict[str, Any], patterns: str, default: str, module: str) -> Any:
    """Returns the module's value: the first pattern in the file that matches, as when PEFT loads it."""
    table = config.get(patterns) or {}
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    # PEFT's own defaults are 8 for both
    return table.get(module, config.get(default, 8))


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
                f"{_MERGE_FIRST}"
            )
    rank = _lookup(config, "rank_pattern", "r", module)
    alpha = _lookup(config, "alpha_pattern", "lora_alpha", module)
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
