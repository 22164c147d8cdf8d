"""The tables of benchmarks/results/tasks.{json,md} from the results in the cache."""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tasks.sweep import mean

REFERENCE = "dc_merge"  # paired differences are taken against it


def write(results: Path, out: Path) -> None:
    """Writes tasks.json and tasks.md from every run folder below `results` that has all it needs.

    Args:
        results: folders `<set>-<kind>-s<seed>-<validation texts>-<test texts>` of own.json and one file
            per method.
        out: the folder of both files.
    """
    runs: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for folder in sorted(path for path in results.iterdir() if (path / "own.json").is_file()):
        task_set, kind, seed, validation_texts, test_texts = folder.name.split("-")
        runs[task_set, kind, f"{validation_texts}-{test_texts}"][int(seed[1:])] = _read(folder)
    settings = [
        {"set": task_set, "kind": kind, "texts": texts, **_summary(seeds)}
        for (task_set, kind, texts), seeds in sorted(runs.items())
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tasks.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (out / "tasks.md").write_text("\n".join(_page(settings)) + "\n", encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    own = json.loads((folder / "own.json").read_text(encoding="utf-8"))
    methods = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != "own.json":
            methods[path.stem.replace("_(", " (")] = json.loads(path.read_text(encoding="utf-8"))
    return {"own": own, "methods": methods}


def normalised(hits: dict[str, str], own: dict[str, str]) -> float:
    """The mean over tasks of accuracy over the own fine-tune's accuracy."""
    return sum(mean(bits) / mean(own[task]) for task, bits in hits.items()) / len(hits)


def normalised_error(hits: dict[str, str], other: dict[str, str] | None, own: dict[str, str]) -> float:
    """The standard error over texts of `normalised`, or of its difference to another model's, text by text.

    The own accuracies are taken as given; the spread between fine-tuning seeds is not part of it.
    """
    variance = 0.0
    for task, bits in hits.items():
        values = [int(bit) for bit in bits]
        if other is not None:
            values = [value - int(bit) for value, bit in zip(values, other[task], strict=True)]
        centre = sum(values) / len(values)
        spread = sum((value - centre) ** 2 for value in values) / (len(values) - 1)
        variance += spread / len(values) / mean(own[task]) ** 2
    return math.sqrt(variance) / len(hits)


def _summary(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of one setting."""
    first = next(iter(seeds.values()))
    tasks = list(first["own"]["own_test"])

    def over_seeds(values: list[float]) -> float:
        return sum(values) / len(values)

    def accuracies(key: str) -> dict[str, float]:
        return {t: over_seeds([mean(run["own"][key][t]) for run in seeds.values()]) for t in tasks}

    common = [n for n in first["methods"] if all(n in run["methods"] for run in seeds.values())]
    rows = []
    for name in common:
        runs = [
            (run["methods"][name], run["own"]["own_test"], run["methods"].get(REFERENCE))
            for run in seeds.values()
        ]
        row: dict[str, Any] = {
            "method": name,
            "accuracy": {t: over_seeds([mean(r["test"][t]) for r, _, _ in runs]) for t in tasks},
            "normalised": over_seeds([normalised(r["test"], own) for r, own, _ in runs]),
            "standard_error": _pooled([normalised_error(r["test"], None, own) for r, own, _ in runs]),
            "scale": [r["scale"] for r, _, _ in runs],
            "alignment": [r["alignment"] for r, _, _ in runs],
            "merge_seconds": over_seeds([r["merge_seconds"] for r, _, _ in runs]),
            "threads": runs[0][0]["threads"],
            "curve": _mean_curve([r["curve"] for r, _, _ in runs]),
        }
        if name != REFERENCE and all(reference for _, _, reference in runs):
            row["difference"] = over_seeds(
                [normalised(r["test"], own) - normalised(ref["test"], own) for r, own, ref in runs if ref]
            )
            row["difference_error"] = _pooled(
                [normalised_error(r["test"], ref["test"], own) for r, own, ref in runs if ref]
            )
        rows.append(row)
    return {
        "tasks": tasks,
        "seeds": sorted(seeds),
        "base": accuracies("base_test"),
        "own": accuracies("own_test"),
        "methods": sorted(rows, key=lambda row: row["normalised"]),
        "regret": regrets(rows),
    }


def _pooled(errors: list[float]) -> float:
    """The error of a mean over seeds that read the same texts: no smaller than that of one seed."""
    return sum(errors) / len(errors)


def _mean_curve(curves: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The mean over seeds at the targets that every seed measured."""
    tables = [{row["alignment"]: row for row in curve} for curve in curves]
    targets = sorted(set.intersection(*(set(table) for table in tables)))
    keys = ("alignment", "scale", "normalised")
    return [{k: sum(table[t][k] for table in tables) / len(tables) for k in keys} for t in targets]


def regrets(rows: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Per method what each alignment target costs on validation texts, against the method's own best one."""
    losses = {}
    for row in rows:
        if row["curve"]:
            best = max(point["normalised"] for point in row["curve"])
            losses[row["method"]] = {p["alignment"]: best - p["normalised"] for p in row["curve"]}
    return losses


HEADING = """# Real tasks: fine-tunes of one sentence encoder, merged

all-MiniLM-L6-v2 fine-tuned on eight text tasks, merged into one model, measured on each task's test texts
with frozen heads. Made by `make tasks`; the recipe is in benchmarks/tasks/train.py, the tasks are in
dirmerge/demo/data.py. λ is chosen on validation texts, the test texts are read once. Normalised accuracy is
accuracy over that of the task's own fine-tune, averaged over tasks. Standard errors are over texts, not over
fine-tuning seeds; differences are paired, text by text.
"""
REGRET = """
Validation accuracy lost at an alignment target a(λD), in points of normalised accuracy, against each
method's own best; empty where the scan had ended before:
"""


def _page(settings: list[dict[str, Any]]) -> list[str]:
    threads = sorted({row["threads"] for setting in settings for row in setting["methods"]})
    counts = " or ".join(map(str, threads))
    lines = [HEADING, f"{platform.machine()}, torch {torch.__version__}, {counts} thread(s)."]
    for setting in settings:
        validation_texts, test_texts = setting["texts"].split("-")
        seeds = ", ".join(map(str, setting["seeds"]))
        title = {"lora": "LoRA adapters (rank 16)", "full": "Full fine-tunes"}[setting["kind"]]
        tasks, base, own = setting["tasks"], setting["base"], setting["own"]
        rate = sum(base[t] / own[t] for t in base) / len(base)
        columns = ["average", "normalised", "against DC-Merge", "λ", "a(λD)", "merge, s"]
        lines += [
            f"\n## {title}, tasks: {setting['set']}\n",
            f"Seeds: {seeds}; at most {validation_texts} validation and {test_texts} test texts a task.\n",
            _line(["method", *tasks, *columns]),
            "|---" * (len(tasks) + 7) + "|",
            _line(["base model", *_percent(base, tasks), f"{100 * rate:.1f}", "", "", "", ""]),
        ]
        lines += [_method_line(row, tasks) for row in setting["methods"]]
        lines += [_line(["own fine-tunes", *_percent(own, tasks), "100", "", "", "", ""]), REGRET]
        targets = sorted({target for losses in setting["regret"].values() for target in losses})
        lines += [
            _line(["method", *(f"{target:g}" for target in targets)]),
            "|---" * (len(targets) + 1) + "|",
        ]
        for method, losses in setting["regret"].items():
            cells = [f"{100 * losses[target]:.1f}" if target in losses else "" for target in targets]
            lines.append(_line([method, *cells]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(accuracy: dict[str, float], tasks: list[str]) -> list[str]:
    mean_accuracy = sum(accuracy.values()) / len(accuracy)
    return [f"{100 * accuracy[t]:.1f}" for t in tasks] + [f"{100 * mean_accuracy:.2f}"]


def _method_line(row: dict[str, Any], tasks: list[str]) -> str:
    difference = ""
    if "difference" in row:
        difference = f"{100 * row['difference']:+.2f} ± {100 * row['difference_error']:.2f}"
    return _line(
        [
            row["method"],
            *_percent(row["accuracy"], tasks),
            f"{100 * row['normalised']:.2f} ± {100 * row['standard_error']:.2f}",
            difference,
            ", ".join(f"{scale:.2f}" for scale in row["scale"]),
            ", ".join(f"{alignment:.2f}" for alignment in row["alignment"]),
            f"{row['merge_seconds']:.2f}",
        ]
    )
