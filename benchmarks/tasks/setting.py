"""Everything one run of the real-task benchmark works with, loaded when it is first asked for."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tasks import debian
from benchmarks.tasks.experiments import SETS
from benchmarks.tasks.store import FOLDER, Results, Row, pack, unpack
from benchmarks.tasks.train import RECIPES, train
from benchmarks.tasks.updates import FineTunes, evaluate, load_finetunes, mean, set_weights
from dirmerge.demo.data import TASKS, prepare
from dirmerge.demo.evaluate import Probe, make_probe
from dirmerge.demo.examples import TaskData
from dirmerge.demo.model import Tokenizer, bfloat16_pays, load_encoder
from dirmerge.demo.sources import Archives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose settings, for `settings`."""
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["pypi"])
    parser.add_argument("--kinds", nargs="+", choices=RECIPES, default=["lora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--accept-changed", action="store_true", help="Debian tasks of another release")


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Every setting that the arguments choose, one after the other."""
    torch.set_num_threads(arguments.threads)
    archives = Archives()
    archives.fetch()
    for name, kind, seed in itertools.product(arguments.sets, arguments.kinds, arguments.seeds):
        yield Setting(name, kind, seed, archives, arguments.out, accept_changed=arguments.accept_changed)


class Setting:
    """A task set fine-tuned in one way with one seed: the base model, fine-tunes, texts, and its results.

    Args:
        name: of the set, see experiments.SETS.
        kind: full or lora.
        seed: of the fine-tunes.
        archives: where downloads and checkpoints are.
        out: folder of the results.
        accept_changed: take Debian tasks that are not those of the pins.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        seed: int,
        archives: Archives,
        out: Path,
        *,
        accept_changed: bool = False,
    ) -> None:
        self.name, self.kind, self.seed = name, kind, seed
        self.set = SETS[name]
        self.bf16 = bfloat16_pays()
        self._archives, self._accept_changed = archives, accept_changed
        self._out = out

    @cached_property
    def results(self) -> Results:
        """The rows that there are, of the same texts: the file has the hash of every task's data."""
        about = {
            "set": self.name,
            "kind": self.kind,
            "seed": self.seed,
            "merged": list(self.set.merged),
            "unseen": list(self.set.unseen),
            "validation_texts": self.set.validation_texts,
            "test_texts": self.set.test_texts,
            "data": {
                task.name: hashlib.sha256(task.to_json().encode()).hexdigest()[:16] for task in self.data
            },
        }
        return Results(self._out / f"{self.name}-{self.kind}-s{self.seed}.json", about)

    @cached_property
    def folder(self) -> Path:
        """The base model's folder."""
        return self._archives.base_model()

    @cached_property
    def base(self) -> Mapping[str, Tensor]:
        """The base model's tensors."""
        found: dict[str, Tensor] = load_file(self.folder / "model.safetensors")
        return found

    @cached_property
    def model(self) -> torch.nn.Module:
        """An encoder, whose weights each measurement sets."""
        return load_encoder(self.folder)

    @cached_property
    def data(self) -> list[TaskData]:
        """The prepared tasks, the merged ones first."""
        cache = self._archives.folder
        return [
            prepare(name, self._archives)
            if name in TASKS
            else debian.prepare(name, cache, accept_changed=self._accept_changed)
            for name in self.set.tasks
        ]

    def probes(self, split: str, texts: int) -> list[Probe]:
        """The first texts of a split of every task, with heads made by the base model."""
        # Not self.model: a row that asks for its texts has set that one's weights.
        base, tokenizer = load_encoder(self.folder), Tokenizer(self.folder)
        return [make_probe(task, split, base, tokenizer, texts=texts) for task in self.data]

    @cached_property
    def validation(self) -> list[Probe]:
        """Texts that choose λ, of the merged tasks alone."""
        return self.probes("validation", self.set.validation_texts)[: len(self.set.merged)]

    @cached_property
    def test(self) -> list[Probe]:
        """Texts that are read once per row, of all tasks."""
        return self.probes("test", self.set.test_texts)

    @cached_property
    def all_finetunes(self) -> FineTunes:
        """The fine-tunes of all tasks, trained where the cache has none."""
        folders = {}
        for task in self.data:
            out = self._archives.folder / "checkpoints" / f"{self.kind}-s{self.seed}" / task.name
            folders[task.name] = out
            if not out.is_dir():
                record = train(task, self.folder, out, RECIPES[self.kind], self.seed, bf16=self.bf16)
                print(
                    f"trained {self.kind} {task.name} seed {self.seed}: {record['seconds']:.0f} s, "
                    f"loss {record['loss']:.3f}",
                    flush=True,
                )
        return load_finetunes(self.kind, folders, self.base)

    @cached_property
    def finetunes(self) -> FineTunes:
        """Those that are merged."""
        count, whole = len(self.set.merged), self.all_finetunes
        return FineTunes(
            self.kind, whole.tasks[:count], {name: parts[:count] for name, parts in whole.deltas.items()}
        )

    @cached_property
    def own(self) -> Row:
        """The row `own`: hits of the base model and of every task's own fine-tune; norms of its update."""
        return self.results.once("own", self._own)

    def own_accuracy(self, split: str) -> dict[str, float]:
        """Accuracy of every task's own fine-tune on `validation` or `test`."""
        return {task: mean(unpack(hits)) for task, hits in self.own[f"own_{split}"].items()}

    def _own(self) -> Row:
        row: dict[str, Any] = {"own_validation": {}, "own_test": {}, "norms": []}
        set_weights(self.model, self.base, None)
        row["base_test"] = self.hits(self.test)
        row["base_validation"] = self.hits(self.validation)
        for t, task in enumerate(self.set.tasks):
            update = self.all_finetunes.single(t)
            set_weights(self.model, self.base, update)
            if task in self.set.merged:
                row["own_validation"] |= self.hits([self.validation[t]])
            row["own_test"] |= self.hits([self.test[t]])
            matrices = [delta for delta in update.scaled.values() if delta.ndim == 2]
            row["norms"].append(float(sum(d.square().sum(dtype=torch.float64) for d in matrices)) ** 0.5)
            print(f"own {self.kind} {task}: {100 * mean(unpack(row['own_test'][task])):.1f} %", flush=True)
        names = [name for name, parts in self.all_finetunes.deltas.items() if len(parts[0].shape) == 2]
        row["base_norm"] = float(sum(self.base[n].square().sum(dtype=torch.float64) for n in names)) ** 0.5
        return row

    def hits(self, probes: list[Probe]) -> dict[str, str]:
        """Per task the packed hits of the model as it is."""
        return {task: pack(b) for task, b in evaluate(self.model, probes, bf16=self.bf16).items()}

    def normalised(self, hits: Mapping[str, str]) -> float:
        """Mean over the merged tasks of test accuracy over the own fine-tune's."""
        own = self.own_accuracy("test")
        return sum(mean(unpack(hits[t])) / own[t] for t in self.set.merged) / len(self.set.merged)
