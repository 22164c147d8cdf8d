"""Feature-space alignment on the real tasks: closed-form maps, learned form, AdaMerging, and the controls.

    python -m benchmarks.tasks.alignment [--kind full|lora] [--seed 0] [--methods tsv_m dc_merge]
    python -m benchmarks.tasks.alignment --learn mda --methods task_arithmetic
    python -m benchmarks.tasks.alignment --learn adamerging --per parameter

Uses the fine-tunes, the scales and the cache of `python -m benchmarks.tasks`, which must have run. The maps
see unlabelled training texts alone; the test texts are read for the accuracies that are printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tasks.sweep import FineTunes, Merge, load_finetunes, merge
from dirmerge.alignment import (
    AlignmentTask,
    Head,
    Learned,
    LearnOptions,
    LearnProgress,
    Model,
    Pooled,
    adamerging,
    closed_form,
    learn,
    read_features,
)
from dirmerge.demo.data import TASKS, prepare
from dirmerge.demo.evaluate import Probe, make_probe
from dirmerge.demo.model import LOGIT_SCALE, Tokenizer, collate, load_encoder
from dirmerge.demo.sources import Archives
from dirmerge.lowrank import LowRank


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


def run_learned(setting: Setting, method: str, kind: str | None, options: LearnOptions, state: Path) -> None:
    """The learned form from a merge, with the closed form of a kind as its start (None for R = I)."""
    update = merge(setting.finetunes, method, {})
    scale = setting.scales[method]
    base = setting.base.updated(update.fixed)
    maps = None
    if kind is not None:
        own = (own_model(setting.base, setting.finetunes, t) for t in range(len(setting.tasks)))
        model = merged_model(setting.base, update, scale)
        maps = [found.matrix for found in closed_form(model, setting.tasks, own, kind=kind)]
        row(setting, f"{method} + {kind}", model, maps)
    found = learn(
        base, update.scaled, setting.tasks, options, scale=scale, maps=maps, state=state, progress=show
    )
    matrices = None if any(m is None for m in found.matrices) else found.matrices
    row(setting, f"{method} + {kind or 'identity'} + learned", found.model, matrices, note(found))


def run_adamerging(setting: Setting, per: str, options: LearnOptions, state: Path) -> None:
    """AdaMerging on all deltas, from 0.3."""
    deltas = {
        name: [d.dense() if isinstance(d, LowRank) else d for d in parts]
        if len(parts[0].shape) < 2
        else parts
        for name, parts in setting.finetunes.deltas.items()
    }
    chosen = options.model_copy(update={"per": per})
    found = adamerging(setting.base, deltas, setting.tasks, chosen, state=state, progress=show)
    row(setting, f"AdaMerging, λ per {per}", found.model, None, note(found))


def show(progress: LearnProgress) -> None:
    if progress.step % 10 == 0:
        print(f"  step {progress.step}: loss {progress.loss:.4f}, {progress.seconds:.0f} s", flush=True)


def note(found: Learned) -> str:
    """What the guard saw, in one phrase."""
    seen = [
        f"{r.step}: {r.loss:.3f} agree {min(r.agreement):.2f} shift {max(r.shift):.2f}" for r in found.history
    ]
    return f"best step {found.best_step}, {found.stopped or 'not stopped'}; {'; '.join(seen)}"


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
    parser.add_argument(
        "--learn", choices=["none", "mda", "adamerging"], default="none", help="instead of the closed form"
    )
    parser.add_argument("--start", choices=["identity", "rotation", "ridge"], default="rotation")
    parser.add_argument("--per", choices=["parameter", "block", "model"], default="parameter")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr-scale", type=float, default=1e-2)
    parser.add_argument("--lr-rotation", type=float, default=1e-5)
    arguments = parser.parse_args()
    setting = load(arguments.kind, arguments.seed, arguments.inputs, arguments.texts, arguments.batch)
    if arguments.learn != "none":
        options = LearnOptions(
            steps=arguments.steps,
            per=arguments.per,
            lr_scale=arguments.lr_scale,
            lr_rotation=arguments.lr_rotation,
            seed=arguments.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.safetensors"
            if arguments.learn == "adamerging":
                run_adamerging(setting, arguments.per, options, state)
                return
            for method in arguments.methods:
                start = None if arguments.start == "identity" else arguments.start
                run_learned(setting, method, start, options, state.with_stem(method))
        return
    row(setting, "base", setting.base)
    for kind in ("rotation", "ridge"):
        own = (own_model(setting.base, setting.finetunes, t) for t in range(len(setting.tasks)))
        found = closed_form(setting.base, setting.tasks, own, kind=kind)
        row(setting, f"base + {kind} (control)", setting.base, [f.matrix for f in found])
    for method in arguments.methods:
        run_closed_form(setting, method)


if __name__ == "__main__":
    main()
