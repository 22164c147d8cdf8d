"""Feature-space alignment on the real tasks: closed-form maps, the learned form, AdaMerging, the controls.

    python -m benchmarks.tasks.alignment [--sets pypi] [--kinds full lora] [--seeds 0] [--methods tsv_m …]
    python -m benchmarks.tasks.alignment --learn mda --start identity [--options alpha=0 rotate=false]
    python -m benchmarks.tasks.alignment --learn adamerging --per model

Works on the rows of `python -m benchmarks.tasks`, which must be there: the scale of each merge is theirs.
Maps and scales are fitted on unlabelled training texts alone, the test texts are read for the accuracies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.tasks import report
from benchmarks.tasks.experiments import rows_of
from benchmarks.tasks.setting import Setting, add_arguments, settings
from benchmarks.tasks.store import Row, pack
from benchmarks.tasks.updates import Merge, merge, set_weights
from dirmerge.alignment import (
    AlignmentTask,
    Head,
    Learned,
    LearnOptions,
    LearnProgress,
    Model,
    Pooled,
    adamerging,
    learn,
)
from dirmerge.alignment.heads import read_pair
from dirmerge.alignment.maps import fit_task
from dirmerge.alignment.weights import ScaledUpdates
from dirmerge.deltas.lowrank import LowRank
from dirmerge.demo.evaluate import Probe
from dirmerge.demo.model import LOGIT_SCALE, collate, embed
from dirmerge.linalg import etf_gap

INPUTS = 512  # unlabelled texts per task
BATCH = 16  # of them, per step of the learned form
METHODS = ("task_arithmetic", "tsv_m", "dc_merge")

MapKind = Literal["rotation", "ridge"]
Start = Literal["identity", "rotation", "ridge"]


def batches(probe: Probe, size: int) -> list[dict[str, Tensor]]:
    """The probe's texts in batches of similar length, as the encoder takes them."""
    order = sorted(range(len(probe.ids)), key=lambda i: len(probe.ids[i]))
    found = []
    for start in range(0, len(order), size):
        tokens, mask = collate([probe.ids[i] for i in order[start : start + size]])
        found.append({"input_ids": tokens, "attention_mask": mask})
    return found


class Bench:
    """What all rows of one setting share: the unlabelled texts and the features of base and fine-tunes."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @cached_property
    def inputs(self) -> list[Probe]:
        """Unlabelled texts of every task."""
        return self.setting.probes("train", INPUTS)

    @cached_property
    def tasks(self) -> list[AlignmentTask]:
        """The same as the alignment takes them."""
        return [
            AlignmentTask(
                p.name, batches(p, BATCH), Head.of_class_vectors(p.head, LOGIT_SCALE), Pooled("mean")
            )
            for p in self.inputs
        ]

    @cached_property
    def own_features(self) -> list[Tensor]:
        """Per task the features that its own fine-tune gives its texts."""
        found = []
        for t, probe in enumerate(self.inputs):
            set_weights(self.setting.model, self.setting.base, self.setting.all_finetunes.single(t))
            found.append(embed(self.setting.model, probe.ids, bf16=self.setting.bf16))
        return found

    def finetunes(self) -> Iterator[Model]:
        """Every task's own fine-tune."""
        for t in range(len(self.inputs)):
            yield Model(self.setting.model).updated(self.setting.all_finetunes.single(t).scaled)

    @cached_property
    def base_features(self) -> list[Tensor]:
        """Per task the features that the base model gives its texts."""
        return self.features(None, 1.0, self.inputs)

    def features(self, update: Merge | None, scale: float, probes: Sequence[Probe]) -> list[Tensor]:
        """Per task the unit features of a merged model."""
        set_weights(self.setting.model, self.setting.base, update, scale)
        return [embed(self.setting.model, probe.ids, bf16=self.setting.bf16) for probe in probes]

    def scale(self, method: str) -> float:
        """λ of the tables' row."""
        row = self.setting.results.get(method)
        if row is None:
            raise SystemExit(
                f"{self.setting.results.path} has no row {method}: run python -m benchmarks.tasks"
            )
        return float(row["scale"])

    def show(self, name: str, row: Row, note: str = "") -> None:
        """Prints a row's normalised accuracy."""
        setting = self.setting
        rate = 100 * setting.normalised(row["test"])
        print(f"{setting.name} {setting.kind} seed {setting.seed} {name}: {rate:.2f} % {note}", flush=True)


def gap(features: Sequence[Tensor], probes: Sequence[Probe]) -> float:
    """Δ_ETF of the class means, mean over the tasks with three classes or more; of two it is always 0."""
    gaps = []
    for z, probe in zip(features, probes, strict=True):
        means = [z[probe.labels == c].mean(0) for c in probe.labels.unique()]
        if len(means) > 2:
            gaps.append(float(etf_gap(torch.stack(means, 1))))
    return sum(gaps) / len(gaps)


def hits(
    features: Sequence[Tensor], probes: Sequence[Probe], maps: Sequence[Tensor] | None
) -> dict[str, str]:
    """Per task the packed hits of the frozen heads, with a map of the features before each."""
    found = {}
    for t, (z, probe) in enumerate(zip(features, probes, strict=True)):
        classes = ((z if maps is None else z @ maps[t]) @ probe.head.T).argmax(1)
        found[probe.name] = pack("".join("01"[hit] for hit in classes.eq(probe.labels).tolist()))
    return found


def closed_form_rows(bench: Bench, method: str | None) -> None:
    """The rows `<method> + rotation` and `<method> + ridge`; None is the base model, the control."""
    setting, label = bench.setting, method or "base"
    kinds: tuple[MapKind, ...] = ("rotation", "ridge")
    names = {kind: f"{label} + {kind}" for kind in kinds}
    if all(setting.results.get(name) is not None for name in names.values()):
        return
    update, scale = None, 1.0
    if method is not None:
        update, scale = merge(setting.finetunes, rows_of(None, setting.kind)[method]), bench.scale(method)
    a = bench.base_features if update is None else bench.features(update, scale, bench.inputs)
    z = bench.features(update, scale, setting.test)
    for kind, name in names.items():

        def compute(kind: MapKind = kind) -> Row:
            start = time.perf_counter()
            found = [
                fit_task(task, a[t], own, bench.base_features[t], kind=kind, ridge=0.3, held_out=0.2)
                for t, (task, own) in enumerate(zip(bench.tasks, bench.own_features, strict=True))
            ]
            maps = [f.matrix for f in found]
            seconds = time.perf_counter() - start
            mapped = [x @ m for x, m in zip(z, maps, strict=True)]
            return {
                "method": method or "base",
                "map": kind,
                "scale": scale,
                "seconds": seconds,
                "agreement": {
                    key: sum(getattr(f, key).agreement for f in found) / len(found)
                    for key in ("plain", "aligned", "control")
                },
                "etf_gap": {"plain": gap(z, setting.test), "aligned": gap(mapped, setting.test)},
                "test": hits(z, setting.test, maps),
            }

        bench.own_features  # noqa: B018  # before the clock starts
        row = setting.results.once(name, compute)
        bench.show(name, row, f"agreement held out {row['agreement']}")


def learned_rows(bench: Bench, method: str, start: Start, options: LearnOptions, suffix: str) -> None:
    """The learned form from a merge: the state after all steps, and the one that the guard keeps.

    Args:
        bench: the setting.
        method: the merge.
        start: the closed form to start from; identity in the paper.
        options: of the learned form.
        suffix: what its name has beyond the method and the start.
    """
    setting = bench.setting
    name = f"{method}{'' if start == 'identity' else f' + {start}'} + learned{suffix}"
    guarded = f"{name}, guarded"
    if all(setting.results.get(row) is not None for row in (name, guarded)):
        return
    update, scale = merge(setting.finetunes, rows_of(None, setting.kind)[method]), bench.scale(method)
    maps = None
    if start != "identity":
        a = bench.features(update, scale, bench.inputs)
        maps = [
            fit_task(task, a[t], own, None, kind=start, ridge=0.3, held_out=0.0).matrix
            for t, (task, own) in enumerate(zip(bench.tasks, bench.own_features, strict=True))
        ]
    told = {"method": method, "start": start, "scale": scale}

    def run(chosen: LearnOptions, guard: bool) -> tuple[Learned, Learned]:
        """What the run keeps, and its last state, which only the saved state has."""
        set_weights(setting.model, setting.base, None)
        base = Model(setting.model).updated(update.fixed)
        own = bench.finetunes() if guard else None
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.safetensors"
            found = learn(
                base,
                update.scaled,
                bench.tasks,
                chosen,
                scale=scale,
                maps=maps,
                own=own,
                state=state,
                progress=show,
            )
            tensors, _ = read_pair(state)
        weights = ScaledUpdates(base, {key: [d] for key, d in update.scaled.items()}, scale, chosen.per)
        weights.set(tensors["scales"])
        turned = [tensors.get(f"{t}.rotation") for t in range(len(bench.tasks))]
        matrices = [
            r if maps is None else maps[t] if r is None else maps[t] @ r for t, r in enumerate(turned)
        ]
        last = dataclasses.replace(found, model=weights.merged(), matrices=matrices, best_step=found.steps)
        return found, last

    kept, last = run(options, True)
    bench.show(guarded, setting.results.once(guarded, lambda: told | _learned(bench, kept, options)))
    if kept.stopped is not None and setting.results.get(name) is None:
        last = run(options.model_copy(update={"min_agreement": 0.0, "max_shift": 1.0}), False)[1]
    bench.show(name, setting.results.once(name, lambda: told | _learned(bench, last, options)))


def adamerging_row(bench: Bench, options: LearnOptions) -> None:
    """AdaMerging from 0.3: layer-wise per parameter, task-wise per model."""
    setting = bench.setting
    name = f"adamerging ({'task' if options.per == 'model' else 'layer'}-wise)"

    def compute() -> Row:
        deltas = {
            key: [d.dense() if isinstance(d, LowRank) else d for d in parts]
            if len(parts[0].shape) < 2
            else parts
            for key, parts in setting.finetunes.deltas.items()
        }
        set_weights(setting.model, setting.base, None)
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state.safetensors"
            found = adamerging(Model(setting.model), deltas, bench.tasks, options, state=state, progress=show)
        return {"method": "adamerging", "scale": 0.3} | _learned(bench, found, options)

    bench.show(name, setting.results.once(name, compute))


def _learned(bench: Bench, found: Learned, options: LearnOptions) -> Row:
    """What a learned form leaves: hits with its maps, and what the guard saw."""
    setting = bench.setting
    weights = found.model.weights
    with torch.no_grad():
        for key, parameter in setting.model.named_parameters():
            parameter.copy_(weights.get(key, setting.base[key]))
    z = [embed(setting.model, probe.ids, bf16=setting.bf16) for probe in setting.test]
    maps = None if any(m is None for m in found.matrices) else [m for m in found.matrices if m is not None]
    mapped = z if maps is None else [x @ m for x, m in zip(z, maps, strict=True)]
    shown = {key: value for key, value in found.to_dict().items() if key != "scales"}
    return {
        "options": options.to_plain(),
        "etf_gap": {"aligned": gap(mapped, setting.test)},
        "test": hits(z, setting.test, maps),
        **shown,
    }


def show(progress: LearnProgress) -> None:
    if progress.step % 20 == 0:
        print(f"  step {progress.step}: loss {progress.loss:.4f}, {progress.seconds:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks.alignment", description=__doc__.splitlines()[0]
    )
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--learn", choices=["none", "mda", "adamerging"], default="none")
    parser.add_argument("--start", choices=["identity", "rotation", "ridge"], default="identity")
    parser.add_argument("--per", choices=["parameter", "block", "model"], default="parameter")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--options", nargs="*", default=[], help="of the learned form, as name=JSON")
    arguments = parser.parse_args(argv)
    changed = {name: json.loads(value) for name, value in (o.split("=", 1) for o in arguments.options)}
    for setting in settings(arguments):
        bench = Bench(setting)
        options = LearnOptions(
            **{"steps": arguments.steps, "per": arguments.per, "seed": setting.seed, **changed}
        )
        if arguments.learn == "adamerging":
            adamerging_row(bench, options)
            continue
        for method in arguments.methods:
            if arguments.learn == "mda":
                suffix = "".join(f" {o}" for o in sorted(arguments.options))
                learned_rows(bench, method, arguments.start, options, suffix)
            else:
                closed_form_rows(bench, method)
        if arguments.learn == "none":
            closed_form_rows(bench, None)
    report.write(arguments.out)


if __name__ == "__main__":
    main()
