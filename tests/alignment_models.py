"""Tiny BERT classifiers in folders, with texts and a recipe that aligns them."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml

D = 16
WORDS = [f"w{i}" for i in range(40)]


def write_models(folder: Path, width: int = D) -> None:
    """Writes base (an encoder), a and b (its fine-tunes with classifiers of 2 and 3 classes), and texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers: Any = importlib.import_module("transformers")

    def config(labels: int) -> Any:
        return transformers.BertConfig(
            vocab_size=44,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=width * 3 // 2,
            max_position_embeddings=16,
            num_labels=labels,
            initializer_range=0.4,
        )

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    base = transformers.BertModel(config(2))
    base.save_pretrained(folder / "base")
    fast.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    for name, labels in (("a", 2), ("b", 3)):
        model = transformers.BertForSequenceClassification(config(labels))
        model.bert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in model.bert.encoder.parameters():
                if parameter.ndim == 2:
                    parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        texts = [
            " ".join(WORDS[i] for i in torch.randint(40, (3 + n % 6,), generator=generator).tolist())
            for n in range(90)
        ]
        if name == "a":
            with (folder / "a.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
        else:
            lines = [json.dumps({"sentence": text, "label": 1}) for text in texts]
            (folder / "b.jsonl").write_text("\n".join(lines))


def recipe(models: Path, **section: Any) -> Path:
    """Writes a recipe that merges and aligns a and b; `section` adds to its section `align`."""
    plain: dict[str, Any] = {
        "merge_method": "tsv_m",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name)} for name in "ab"],
        "scale": 0.8,
        "align": {
            "inputs": 80,
            "batch_size": 20,
            "tasks": [
                {"name": "first", "data": str(models / "a.csv")},
                {"name": "second", "data": str(models / "b.jsonl"), "column": "sentence"},
            ],
        }
        | section,
    }
    path = models / "recipe.yml"
    path.write_text(yaml.safe_dump(plain))
    return path
