"""Writes PEFT LoRA adapters, module by module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dirmerge.checkpoints.adapter_config import PREFIX
from dirmerge.checkpoints.adapters import Kind
from dirmerge.checkpoints.files import write_json
from dirmerge.checkpoints.reader import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dirmerge.checkpoints.safetensors_writer import Entry, SafetensorsFileWriter
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import NonFiniteError
from dirmerge.linalg import all_finite


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
            return PREFIX + name
        if leaf != "bias":
            raise ValueError(f"{name!r} cannot be written in full: its module {module!r} has an update")
        return f"{PREFIX}{module}.base_layer.bias"

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
        return f"{PREFIX}{module.name}.lora_embedding_A", f"{PREFIX}{module.name}.lora_embedding_B"
    return f"{PREFIX}{module.name}.lora_A.weight", f"{PREFIX}{module.name}.lora_B.weight"
