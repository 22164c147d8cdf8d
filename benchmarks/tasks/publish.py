"""Copies the LoRA adapters of seed 0 into the package, each with a card that states what was measured.

python -m benchmarks.tasks.publish  (after python -m benchmarks.tasks --kinds lora)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft

from benchmarks.tasks.train import BASE_NAME, RECIPES, seed_of
from dirmerge.demo.data import TASKS, prepare
from dirmerge.demo.evaluate import accuracy, make_probe
from dirmerge.demo.examples import TaskData
from dirmerge.demo.model import Tokenizer, load_encoder
from dirmerge.demo.run import adapter_folder
from dirmerge.demo.sources import Archives

CARD = """---
license: apache-2.0
base_model: {base}
library_name: peft
tags: [lora, text-classification]
---
# {name}: {title}

A LoRA adapter of all-MiniLM-L6-v2 for the demo of dirmerge: material for merging, not a product.

| on {n_test} test texts | accuracy, % |
|---|---|
| base model | {base_accuracy:.1f} |
| with this adapter | {accuracy:.1f} |
| always the commonest class | {majority:.1f} |

**Data.** {n_train} texts of {classes} classes from {package} {version}; licence of the texts: {licence}.
Source: {attribution}.
The texts are not part of this package; sha256 of the prepared task:
`{sha256}`. Splits: dirmerge/demo/data.py.

**Use.** Mean pooling over at most 48 tokens, L2 normalisation, logits = 20 · cosine with the base model's
own embeddings of the prompts:

{prompts}

**Training.** Rank {rank}, alpha {alpha}, no dropout, the six linear matrices of each layer; AdamW, learning
rate {learning_rate:g}, {steps} steps of {batch} texts, warm-up over a tenth of them, then cosine; gradients
clipped at 1; random seed {seed}, another one for each adapter, so row spaces are independent. Stored in
float16.

**Limits.** Short English texts{extra}, one training run, no search over settings.
"""
EXTRA = {
    "city": " (names)",
    "gender": " (first names of a 2008 list; many names are used by all genders, and the list knows two)",
    "code": " (source code; test and train texts can be of one file)",
    "icd10": " (official wording; not for clinical use)",
}


def card(task: TaskData, version: str, base_accuracy: float, own_accuracy: float) -> str:
    """The README of one adapter."""
    source = TASKS[task.name]
    recipe = RECIPES["lora"]
    labels = [label for _, label in task.test]
    return CARD.format(
        base=BASE_NAME,
        name=task.name,
        title=source.title,
        n_test=len(task.test),
        n_train=len(task.train),
        classes=len(task.classes),
        base_accuracy=100 * base_accuracy,
        accuracy=100 * own_accuracy,
        majority=100 * max(labels.count(label) for label in set(labels)) / len(labels),
        package=source.package,
        version=version,
        licence=source.licence,
        attribution=source.attribution,
        sha256=source.sha256,
        prompts="\n".join(f"- {prompt}" for prompt in task.prompts),
        rank=recipe.rank,
        alpha=recipe.alpha,
        learning_rate=recipe.learning_rate,
        steps=recipe.steps,
        batch=recipe.batch,
        seed=seed_of("lora", task.name, 0),
        extra=EXTRA.get(task.name, ""),
    )


def main() -> None:
    archives = Archives()
    archives.fetch()
    base_folder = archives.base_model()
    base = load_encoder(base_folder)
    tokenizer = Tokenizer(base_folder)
    for name, source in TASKS.items():
        task = prepare(name, archives)
        trained = archives.folder / "checkpoints" / "lora-s0" / name
        record = json.loads((trained / "training.json").read_text(encoding="utf-8"))
        probe = make_probe(task, "test", base, tokenizer)
        model = peft.PeftModel.from_pretrained(load_encoder(base_folder), str(trained)).eval()
        before, after = accuracy(base, probe, bf16=False), accuracy(model, probe, bf16=False)
        folder = Path(adapter_folder(name))
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trained / file, folder / file)
        version = archives.sources[source.package.lower()].version
        (folder / "README.md").write_text(card(task, version, before, after), encoding="utf-8")
        seconds = record["seconds"]
        print(
            f"{name}: base {100 * before:.1f} %, adapter {100 * after:.1f} %, trained in {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
