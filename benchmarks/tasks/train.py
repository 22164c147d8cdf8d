"""Fine-tuning of the base encoder on one task: a LoRA adapter, or all weights but the embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dirmerge.demo.evaluate import make_probe
from dirmerge.demo.examples import TaskData
from dirmerge.demo.model import Tokenizer, bucketed_batches, load_encoder, logits, pooled

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
LORA_MODULES = (
    "query",
    "key",
    "value",
    "intermediate.dense",
    "output.dense",
)  # six matrices: two end in output.dense


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a fine-tune is made; no dropout, linear warm-up over a tenth of the steps, then a cosine."""

    kind: str
    learning_rate: float
    weight_decay: float
    steps: int = 200
    batch: int = 32
    clip: float = 1.0
    rank: int = 16
    alpha: int = 16


RECIPES = {
    "lora": Recipe("lora", 1e-3, 0.0),
    "full": Recipe("full", 1e-4, 0.01),
    **{f"lora-r{r}": Recipe("lora", 1e-3, 0.0, rank=r, alpha=r) for r in (4, 64)},
}


def seed_of(kind: str, task: str, seed: int) -> int:
    """The seed of one fine-tune: another one for every task, so that no two adapters share their random A."""
    return int.from_bytes(hashlib.sha256(f"{kind}:{task}:{seed}".encode()).digest()[:4], "big")


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, times a cosine from 1 to 0."""
    return min(1.0, (step + 1) / max(1.0, steps / 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    task: TaskData, base_folder: Path, out: Path, recipe: Recipe, seed: int, *, bf16: bool
) -> dict[str, object]:
    """Fine-tunes the base model on a task's train split; writes the result to `out`, complete or not at all.

    Args:
        task: the prepared task.
        base_folder: the base model's folder.
        out: the new folder: a PEFT adapter (float16) or a model folder (float32).
        recipe: learning rate, steps, rank…
        seed: the seed of the whole set; the task's own follows from it by `seed_of`.
        bf16: run the encoder under bfloat16 autocast.

    Returns:
        Loss of the last tenth of the steps, seconds, and the recipe; also written as training.json.
    """
    own_seed = seed_of(recipe.kind, task.name, seed)
    torch.manual_seed(own_seed)
    tokenizer = Tokenizer(base_folder)
    model: Any = load_encoder(base_folder)
    probe = make_probe(task, "train", model, tokenizer)
    if recipe.kind == "lora":
        import peft

        config = peft.LoraConfig(
            task_type="FEATURE_EXTRACTION",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=0.0,
            target_modules=list(LORA_MODULES),
            inference_mode=False,
        )
        model = peft.get_peft_model(model, config).eval()
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("encoder."))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    batches = bucketed_batches([len(ids) for ids in probe.ids], recipe.batch, random.Random(own_seed))

    losses = []
    start = time.perf_counter()
    for step in range(recipe.steps):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe.steps)
        features = pooled(model, [probe.ids[i] for i in batch], bf16=bf16)
        loss = torch.nn.functional.cross_entropy(logits(features, probe.head), probe.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-max(1, recipe.steps // 10) :]
    record: dict[str, object] = {
        "task": task.name,
        "seed": seed,
        "loss": sum(tail) / len(tail),
        "seconds": time.perf_counter() - start,
        "parameters": sum(p.numel() for p in parameters),
        "recipe": dataclasses.asdict(recipe),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        folder = Path(staging) / "model"
        folder.mkdir()
        if recipe.kind == "lora":
            save_adapter(model, folder)
        else:
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
                shutil.copyfile(base_folder / name, folder / name)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        folder.rename(out)
    return record


def save_adapter(model: Any, folder: Path) -> None:
    """Writes a PEFT model's adapter in float16, with a config whose text does not depend on set order."""
    import peft

    tensors = peft.get_peft_model_state_dict(model)
    half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = BASE_NAME
    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
