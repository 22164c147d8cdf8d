"""The demo's text encoder: a transformer from a local folder, mean pooling, and frozen heads made of prompts.

A task's head is the base model's own embedding of one prompt per class, so logits = 20 · cosine need no
training and stay the same for base, fine-tunes and merged models: the analogue of CLIP's zero-shot heads.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 48
LOGIT_SCALE = 20.0


def load_encoder(folder: Path) -> torch.nn.Module:
    """The transformer of a local folder, loaded by transformers: float32, evaluation mode (no dropout)."""
    import transformers

    hub_logging: Any = transformers.utils.logging
    hub_logging.disable_progress_bar()
    model: Any = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    module: torch.nn.Module = model.eval()
    return module


class Tokenizer:
    """Texts → token ids, at most 48 of them, the end token kept.

    Args:
        folder: a model folder with tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]


def collate(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(batch, longest) token ids and the mask of the real ones, both int64."""
    longest = max(len(row) for row in ids)
    tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return tokens, mask


def pooled(model: torch.nn.Module, ids: Sequence[Sequence[int]], *, bf16: bool) -> Tensor:
    """(batch, d) unit vectors in float32: the normalised mean of the last hidden states over real tokens."""
    tokens, mask = collate(ids)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
    weights = mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def embed(model: torch.nn.Module, ids: Sequence[Sequence[int]], *, bf16: bool, batch: int = 64) -> Tensor:
    """(n, d) embeddings of n tokenised texts, computed in batches of similar length."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = [
        pooled(model, [ids[i] for i in order[s : s + batch]], bf16=bf16) for s in range(0, len(order), batch)
    ]
    result = torch.empty(len(ids), parts[0].shape[1])
    result[torch.tensor(order)] = torch.cat(parts)
    return result


def head(base: torch.nn.Module, tokenizer: Tokenizer, prompts: Sequence[str]) -> Tensor:
    """(classes, d) frozen class vectors: the base model's float32 embeddings of the prompts."""
    return embed(base, tokenizer(prompts), bf16=False)


def logits(features: Tensor, class_vectors: Tensor) -> Tensor:
    """(n, classes) 20 · cosine of unit features and unit class vectors."""
    return LOGIT_SCALE * features @ class_vectors.T


def bucketed_batches(lengths: Sequence[int], batch: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless batches of indices of similar length: shuffled, sorted within sixteen batches, shuffled again.

    Args:
        lengths: token count of every text.
        batch: the size; a last batch of less than half of it is dropped.
        rng: the only source of randomness.
    """
    while True:
        indices = list(range(len(lengths)))
        rng.shuffle(indices)
        batches: list[list[int]] = []
        for start in range(0, len(indices), batch * 16):
            chunk = sorted(indices[start : start + batch * 16], key=lambda i: lengths[i])
            batches += [chunk[s : s + batch] for s in range(0, len(chunk), batch)]
        rng.shuffle(batches)
        yield from (b for b in batches if 2 * len(b) >= min(batch, len(indices)))


def bfloat16_pays() -> bool:
    """Whether the CPU multiplies bfloat16 matrices faster than float32 ones, so that autocast saves time.

    True with AMX tiles. Not with AVX-512 BF16 alone: there the linear layers of this model took 1.6 times as
    long as in float32 (Xeon, oneDNN 3.12, one thread).
    """
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
