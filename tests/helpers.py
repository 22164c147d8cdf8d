"""Builders of tiny checkpoints and adapters on disk, with nothing but json and the safetensors library."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MATRICES = {
    "layers.0.attn.q_proj": (16, 16),
    "layers.0.mlp.up_proj": (24, 16),
    "layers.1.attn.q_proj": (16, 16),
    "layers.1.mlp.up_proj": (24, 16),
    "layers.11.attn.q_proj": (16, 16),
}
"""Module names and (out, in) shapes of the tiny model; layers.1 and layers.11 tell anchored patterns from "
"others."""


def tiny_state(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    base: Mapping[str, Tensor] | None = None,
    size: float = 0.01,
) -> dict[str, Tensor]:
    """Returns the tensors of a tiny language model: embedding, matrices with biases, norm, lm_head.

    With `base` it is a fine-tune: base + size · noise.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (32, 16)}
    for module, shape in MATRICES.items():
        shapes[f"{module}.weight"] = shape
        shapes[f"{module}.bias"] = (shape[0],)
    shapes |= {"norm.weight": (16,), "lm_head.weight": (32, 16)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if base is not None:
        state = {name: base[name].float() + size * value for name, value in state.items()}
    return {name: value.to(dtype) for name, value in state.items()}


def write_model(
    folder: Path, state: Mapping[str, Tensor], shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """Writes a folder in the Hugging Face layout: weights (one file, or shards), config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    if shards == 1:
        save_file(
            {name: state[name].contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"}
        )
    else:
        weight_map: dict[str, str] = {}
        per_shard = math.ceil(len(names) / shards)
        for part in range(shards):
            file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
            chosen = names[part * per_shard : (part + 1) * per_shard]
            save_file({name: state[name].contiguous() for name in chosen}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(chosen, file)
        total = sum(value.nbytes for value in state.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    write_json(
        folder / "config.json", {"model_type": "tiny", "torch_dtype": dtype} if config is None else config
    )
    write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 32})
    return folder


def write_adapter_folder(
    folder: Path,
    modules: Mapping[str, tuple[int, int]] | None = None,
    rank: int = 2,
    alpha: float = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    saved: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> dict[str, Tensor]:
    """Writes a PEFT LoRA adapter for linear modules and returns its dense float64 updates by weight name.

    `saved` are full tensors (modules_to_save, biases); further keywords go into adapter_config.json.
    use_rslora is
    honoured in the returned updates; patterns are not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    for module, (m, n) in (modules or MATRICES).items():
        a = (torch.randn(rank, n, generator=generator) / math.sqrt(n)).to(dtype)
        b = (torch.randn(m, rank, generator=generator) * 0.1).to(dtype)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        updates[f"{module}.weight"] = scaling * (b.double() @ a.double())
    tensors |= {f"base_model.model.{name}": value.contiguous() for name, value in (saved or {}).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "base_model_name_or_path": "tiny/base",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted({module.rpartition(".")[2] for module in modules or MATRICES}),
            "bias": "none",
            "fan_in_fan_out": False,
        }
        | config,
    )
    return updates


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a safetensors file with any header; `length` replaces the true length of the header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data
