"""Feature-space alignment on the real tasks: closed-form maps, learned form, AdaMerging, and the controls.

    python -m benchmarks.tasks.alignment [--kind full|lora] [--seed 0] [--methods tsv_m dc_merge]

Uses the fine-tunes, the scales and the cache of `python -m benchmarks.tasks`, which must have run. The maps
see unlabelled training texts alone; the test texts are read for the accuracies that are printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tasks.sweep import FineTunes, Merge, load_finetunes, merge
from dirmerge.alignment import AlignmentTask, Head, Model, Pooled, closed_form, read_features
from dirmerge.demo.data import TASKS, prepare
from dirmerge.demo.evaluate import Probe, make_probe
from dirmerge.demo.model import LOGIT_SCALE, Tokenizer, collate, load_encoder
from dirmerge.demo.sources import Archives


@dataclass(frozen=True)
class Setting:
    """The base model, its fine-tunes, the tasks' unlabelled texts and the texts that measure accuracy."""

    kind: str
    base: Model
    weights: Mapping[str, Tensor]
    finetunes: FineTunes
    tasks: Sequence[AlignmentTask]
    test: Sequence[AlignmentTask]
    labels: Sequence[Tensor]
    own: Sequence[float]
    scales: Mapping[str, float]


def batches(probe: Probe, size: int) -> list[dict[str, Tensor]]:
    """The probe's texts in batches of similar length, as the encoder takes them."""
    order = sorted(range(len(probe.ids)), key=lambda i: len(probe.ids[i]))
    found = []
    for start in range(0, len(order), size):
        tokens, mask = collate([probe.ids[i] for i in order[start : start + size]])
        found.append({"input_ids": tokens, "attention_mask": mask})
    return found


def ordered_labels(probe: Probe) -> Tensor:
    """The labels in the order of `batches`."""
    return probe.labels[torch.tensor(sorted(range(len(probe.ids)), key=lambda i: len(probe.ids[i])))]


def load(kind: str, seed: int, inputs: int, texts: int, batch: int) -> Setting:
    """Everything a run needs, from the cache."""
    archives = Archives()
    archives.fetch()
    folder = archives.base_model()
    weights = load_file(folder / "model.safetensors")
    module, tokenizer = load_encoder(folder), Tokenizer(folder)
    data = [prepare(name, archives) for name in TASKS]
    folders = {name: archives.folder / "checkpoints" / f"{kind}-s{seed}" / name for name in TASKS}
    finetunes = load_finetunes(kind, folders, weights)

    def tasks(split: str, count: int, size: int) -> tuple[list[AlignmentTask], list[Tensor]]:
        probes = [make_probe(task, split, module, tokenizer, texts=count) for task in data]
        return [
            AlignmentTask(
                p.name, batches(p, size), Head.of_class_vectors(p.head, LOGIT_SCALE), Pooled("mean")
            )
            for p in probes
        ], [ordered_labels(p) for p in probes]

    test, labels = tasks("test", texts, 64)
    results = archives.folder / "results"
    run = next(path for path in sorted(results.glob(f"*-{kind}-s{seed}-*")) if (path / "own.json").is_file())
    scales = {
        path.stem: json.loads(path.read_text())["scale"] for path in run.glob("*.json") if path.stem != "own"
    }
    base = Model(module)
    own = [
        accuracy(own_model(base, finetunes, t), task, y)
        for t, (task, y) in enumerate(zip(test, labels, strict=True))
    ]
    return Setting(
        kind, base, weights, finetunes, tasks("train", inputs, batch)[0], test, labels, own, scales
    )


def own_model(base: Model, finetunes: FineTunes, t: int) -> Model:
    """A task's own fine-tune."""
    return base.updated(finetunes.single(t).scaled)


def merged_model(base: Model, update: Merge, scale: float) -> Model:
    """The merged model: scaled updates of the matrices, means of the vectors."""
    return base.updated(update.scaled, scale).updated(update.fixed)


def accuracy(model: Model, task: AlignmentTask, labels: Tensor, matrix: Tensor | None = None) -> float:
    """Accuracy on a task, with a map of the features before its head."""
    z = read_features(model, task)
    return task.head.logits(z if matrix is None else z @ matrix).argmax(1).eq(labels).double().mean().item()


def row(
    setting: Setting, name: str, model: Model, maps: Sequence[Tensor] | None = None, note: str = ""
) -> float:
    """Prints and returns the normalised accuracy, %."""
    values = [
        accuracy(model, task, y, None if maps is None else maps[t])
        for t, (task, y) in enumerate(zip(setting.test, setting.labels, strict=True))
    ]
    rate = 100 * mean_of([v / o for v, o in zip(values, setting.own, strict=True)])
    cells = " ".join(f"{100 * v:5.1f}" for v in values)
    print(
        f"{setting.kind:4s} {name:28s} {cells} | {100 * mean_of(values):.2f} normalised {rate:.2f} {note}",
        flush=True,
    )
    return rate


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def run_closed_form(setting: Setting, method: str) -> None:
    """Plain, rotation and ridge, each with its control."""
    update = merge(setting.finetunes, method, {})
    scale = setting.scales[method]
    model = merged_model(setting.base, update, scale)
    row(setting, method, model, note=f"λ {scale:.2f}")
    own = [
        read_features(own_model(setting.base, setting.finetunes, t), task)
        for t, task in enumerate(setting.tasks)
    ]
    for kind in ("rotation", "ridge"):
        start = time.perf_counter()
        found = closed_form(model, setting.tasks, own, base=setting.base, kind=kind)
        seconds = time.perf_counter() - start
        agree = [mean_of([getattr(f, k).agreement for f in found]) for k in ("plain", "aligned", "control")]
        note = f"{seconds:.1f} s, agreement held out {' / '.join(f'{100 * a:.1f}' for a in agree)}"
        row(setting, f"{method} + {kind}", model, [f.matrix for f in found], note)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks.alignment", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kind", choices=["full", "lora"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["tsv_m", "dc_merge"])
    parser.add_argument("--inputs", type=int, default=512, help="unlabelled texts per task")
    parser.add_argument("--texts", type=int, default=600, help="test texts per task")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    setting = load(arguments.kind, arguments.seed, arguments.inputs, arguments.texts, arguments.batch)
    row(setting, "base", setting.base)
    for kind in ("rotation", "ridge"):
        own = (own_model(setting.base, setting.finetunes, t) for t in range(len(setting.tasks)))
        found = closed_form(setting.base, setting.tasks, own, kind=kind)
        row(setting, f"base + {kind} (control)", setting.base, [f.matrix for f in found])
    for method in arguments.methods:
        run_closed_form(setting, method)


if __name__ == "__main__":
    main()
