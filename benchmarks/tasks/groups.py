"""The runs of one task set and kind over all seeds, read from the result files, and estimates from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks.store import Row, read, unpack

RESAMPLES = 2000

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % bootstrap interval over texts, and the value of each seed."""

    value: float
    low: float
    high: float
    seeds: dict[int, float]

    def cell(self, *, sign: bool = False) -> str:
        """The numbers in per cent, as a table has them."""
        form = "+.2f" if sign else ".2f"
        return f"{100 * self.value:{form}} [{100 * self.low:{form}}, {100 * self.high:{form}}]"

    def seed_cell(self, *, sign: bool = False) -> str:
        """The seeds' values in per cent."""
        form = "+.1f" if sign else ".1f"
        return " / ".join(f"{100 * self.seeds[seed]:{form}}" for seed in sorted(self.seeds))


@cache
def resamples(task: str, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(RESAMPLES, n) how often each of a task's n texts is in each bootstrap sample."""
    rng = np.random.default_rng([n, *task.encode()])
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float32)


class Group:
    """The runs of one task set and kind over all seeds.

    Args:
        runs: by seed the file's `about` and `rows`.
    """

    def __init__(self, runs: dict[int, dict[str, Any]]) -> None:
        self.runs = dict(sorted(runs.items()))
        about = next(iter(self.runs.values()))["about"]
        self.set, self.kind = about["set"], about["kind"]
        self.merged: list[str] = about["merged"]
        self.unseen: list[str] = about["unseen"]
        self.texts = about["validation_texts"], about["test_texts"]
        self._resampled: dict[tuple[str, str, int], Floats] = {}

    @cached_property
    def names(self) -> list[str]:
        """All rows with test results that any seed has, but `own`."""
        found: dict[str, None] = {}
        for run in self.runs.values():
            found |= dict.fromkeys(name for name, row in run["rows"].items() if "test" in row)
        return list(found)

    def seeds(self, *names: str) -> list[int]:
        """The seeds that have all these rows."""
        return [s for s, run in self.runs.items() if all(name in run["rows"] for name in ("own", *names))]

    def rows(self, name: str) -> list[Row]:
        """The row of that name in every seed that has it."""
        return [self.runs[seed]["rows"][name] for seed in self.seeds(name)]

    def hits(self, name: str, task: str, seed: int) -> Floats:
        """(texts,) 0 or 1 for each test text; `base` and `own` are rows too."""
        rows = self.runs[seed]["rows"]
        models = rows["own"][f"{name}_test"] if name in ("base", "own") else rows[name]["test"]
        packed = models[task]
        return np.array([int(bit) for bit in unpack(packed)], dtype=np.float64)

    def accuracy(self, name: str, task: str, seed: int) -> Floats:
        """(1 + resamples,) accuracy on a task's texts, and on resamples that are the same for every row."""
        key = name, task, seed
        if key not in self._resampled:
            hits = self.hits(*key)
            self._resampled[key] = np.concatenate(
                ([hits.mean()], resamples(task, len(hits)) @ hits / len(hits))
            )
        return self._resampled[key]

    def estimate(
        self,
        name: str,
        reference: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        normalised: bool = True,
        seeds: Iterable[int] | None = None,
    ) -> Estimate:
        """Mean accuracy of a row over tasks and seeds, or its paired difference to another row's.

        Args:
            name: the row.
            reference: the other row.
            tasks: of the mean; default the merged ones.
            normalised: divide by the accuracy of the task's own fine-tune, which is resampled with it.
            seeds: default all that have the rows.
        """
        needed = [n for n in (name, reference) if n not in (None, "base", "own")]
        chosen = list(seeds) if seeds is not None else self.seeds(*[n for n in needed if n is not None])
        values = {}
        for seed in chosen:
            parts = []
            for task in tasks or self.merged:
                value = self.accuracy(name, task, seed)
                if reference is not None:
                    value = value - self.accuracy(reference, task, seed)
                parts.append(value / self.accuracy("own", task, seed) if normalised else value)
            values[seed] = np.mean(parts, axis=0)
        mean = np.mean(list(values.values()), axis=0)
        low, high = np.quantile(mean[1:], [0.025, 0.975])
        return Estimate(float(mean[0]), float(low), float(high), {s: float(v[0]) for s, v in values.items()})


def load(folder: Path) -> dict[tuple[str, str], Group]:
    """All groups that have results, by set and kind."""
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = read(path)
        if "own" in run["rows"]:
            about = run["about"]
            runs.setdefault((about["set"], about["kind"]), {})[about["seed"]] = run
    return {key: Group(found) for key, found in sorted(runs.items())}
