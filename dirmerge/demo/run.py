"""`dirmerge demo`: eight real adapters of a real transformer, merged by every method, and evaluated."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dirmerge.api import merge
from dirmerge.demo.data import TASKS, prepare
from dirmerge.demo.evaluate import (
    Probe,
    accuracies,
    accuracy,
    average,
    make_probe,
    normalised,
    standard_error,
)
from dirmerge.demo.model import Tokenizer, bfloat16_pays, load_encoder
from dirmerge.demo.picture import draw
from dirmerge.demo.sources import Archives, cache_folder
from dirmerge.errors import RecipeError
from dirmerge.methods import get_method

ADAPTERS = Path(__file__).with_name("adapters")
METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "wudi",
    "tsv_m",
    "mda",
    "iso_c",
    "iso_cts",
    "dc_merge",
    "whitened",
)
# WUDI by Adam takes minutes here, its exact minimiser seconds; the accuracies were within a point.
OPTIONS: dict[str, dict[str, Any]] = {"wudi": {"solver": "exact"}}
KEPT = "dc_merge"  # the merged model that stays in the output folder


@dataclass(frozen=True)
class MethodResult:
    """One merged model: accuracy by task, the scale λ it was written with, and what the merge took."""

    accuracy: dict[str, float]
    average: float
    normalised: float
    scale: float | None
    merge_seconds: float


def adapter_folder(task: str) -> Path:
    """The folder of the committed adapter of a task."""
    return ADAPTERS / task


def recipe(method: str, base: Path, tasks: Iterable[str]) -> dict[str, Any]:
    """The recipe that merges the tasks' adapters onto the base with a method's default scale."""
    found: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(adapter_folder(task))} for task in tasks],
    }
    if method in OPTIONS:
        found["parameters"] = OPTIONS[method]
    return found


def main(
    out: Path = Path("demo-out"),
    *,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    texts: int = 400,
    console: Console | None = None,
) -> dict[str, Any]:
    """Merges the adapters by each method, evaluates all models on real texts, makes table and picture.

    Args:
        out: folder for results.json, accuracy.png, recipe.yml and the DC-Merge model, replacing earlier ones.
        tasks: names of `dirmerge.demo.data.TASKS`; default all eight.
        methods: names of merge methods; default all ten.
        texts: at most so many test texts of each task.
        console: where the progress and the table go; default standard output.

    Returns:
        What results.json holds.

    Raises:
        RecipeError: an unknown task or method, fewer than two tasks, or less than one text.
        ModuleNotFoundError: a package of the extra `demo` is missing.
        SourceError: a download failed, or is not what was promised.
    """
    chosen = tuple(tasks or TASKS)
    names = tuple(methods or METHODS)
    _check(chosen, names, texts)
    for module in ("transformers", "peft", "matplotlib"):
        importlib.import_module(module)  # a missing one is told before anything is downloaded
    show = console or Console()

    archives = Archives()
    if archives.missing():
        show.print(f"Downloading base model and texts to {archives.downloads} (once, 130 MB) …")
    archives.fetch()
    start = time.perf_counter()
    base_folder = archives.base_model()
    base = load_encoder(base_folder)
    tokenizer = Tokenizer(base_folder)
    bf16 = bfloat16_pays()
    probes = [make_probe(prepare(name, archives), "test", base, tokenizer, texts=texts) for name in chosen]
    sizes = {probe.name: len(probe.labels) for probe in probes}
    show.print(f"Evaluating the base model and {len(chosen)} adapters on {sum(sizes.values())} test texts …")
    base_accuracy = accuracies(base, probes, bf16=bf16)
    own = {probe.name: accuracy(_with_adapter(base_folder, probe.name), probe, bf16=bf16) for probe in probes}

    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, MethodResult] = {}
    with tempfile.TemporaryDirectory(prefix="dirmerge-demo-") as scratch:
        for method in names:
            show.print(f"Merging by {method} …")
            folder = (out if method == KEPT else Path(scratch)) / method
            results[method] = _merge_and_evaluate(method, base_folder, chosen, folder, probes, own, bf16=bf16)
            if method != KEPT:
                shutil.rmtree(folder)
    summary = {
        "tasks": {name: {"title": TASKS[name].title, "texts": sizes[name]} for name in chosen},
        "base": {"accuracy": base_accuracy, "average": average(base_accuracy)},
        "own_adapters": {"accuracy": own, "average": average(own)},
        "methods": {method: asdict(result) for method, result in results.items()},
        "standard_error_of_average": standard_error(own, sizes),
        "arithmetic": "bfloat16" if bf16 else "float32",
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
    }
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    text = yaml.safe_dump(recipe(KEPT, base_folder, chosen), sort_keys=False)
    (out / "recipe.yml").write_text(text, encoding="utf-8")
    draw(summary, out / "accuracy.png")
    _report(summary, out, show)
    return summary


def _check(tasks: Sequence[str], methods: Sequence[str], texts: int) -> None:
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise RecipeError(f"tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if len(set(tasks)) != len(tasks) or len(tasks) < 2:
        raise RecipeError(f"a merge needs two or more different tasks, got {', '.join(tasks)}")
    if texts < 1:
        raise RecipeError(f"texts must be at least 1, got {texts}")
    try:
        for name in methods:
            get_method(name)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _with_adapter(base_folder: Path, task: str) -> torch.nn.Module:
    """The base with one adapter, put together by PEFT."""
    import peft

    with warnings.catch_warnings():
        # peft calls a function that transformers is about to rename: nothing a user of the demo can act on.
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = peft.PeftModel.from_pretrained(load_encoder(base_folder), str(adapter_folder(task)))
    module: torch.nn.Module = model.eval()
    return module


def _merge_and_evaluate(
    method: str,
    base_folder: Path,
    tasks: Sequence[str],
    folder: Path,
    probes: Sequence[Probe],
    own: Mapping[str, float],
    *,
    bf16: bool,
) -> MethodResult:
    start = time.perf_counter()
    report = merge(recipe(method, base_folder, tasks), out=folder, overwrite=True)
    seconds = time.perf_counter() - start
    found = accuracies(load_encoder(folder), probes, bf16=bf16)
    return MethodResult(found, average(found), normalised(found, own), report.scale, seconds)


def _report(summary: Mapping[str, Any], out: Path, show: Console) -> None:
    """Prints the table, and how the user merges his own models."""
    names = list(summary["tasks"])
    # Two narrow tables: together they would not fit the 80 columns of a plain terminal or a log.
    tasks, totals = (
        Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for title in ("Accuracy on each task's test texts, %", "All tasks")
    )
    for table, columns in ((tasks, names), (totals, ("average, %", "normalised, %", "λ", "merge, s"))):
        table.add_column("model", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)

    def add(model: str, row: Mapping[str, Any], rest: Sequence[str], style: str | None) -> None:
        tasks.add_row(model, *(f"{100 * row['accuracy'][name]:.1f}" for name in names), style=style)
        totals.add_row(model, f"{100 * row['average']:.1f}", *rest, style=style)

    own = summary["own_adapters"]
    base_rate = normalised(summary["base"]["accuracy"], own["accuracy"])
    add("base model", summary["base"], (f"{100 * base_rate:.1f}", "", ""), "dim")
    ranked = sorted(summary["methods"].items(), key=lambda item: item[1]["average"])
    for method, row in ranked:
        scale = "" if row["scale"] is None else f"{row['scale']:.2f}"
        last = (f"{100 * row['normalised']:.1f}", scale, f"{row['merge_seconds']:.1f}")
        add(method, row, last, "bold" if method == KEPT else None)
    add("own adapters", own, ("100.0", "", ""), "dim")
    show.print(tasks, totals)
    error = 100 * summary["standard_error_of_average"]
    show.print(
        "Normalised: accuracy over that of the task's own adapter, averaged over tasks. Standard error of an "
        f"average: {error:.1f} points over texts; the difference of two rows has less.\n"
        f"The adapters' cards are in {ADAPTERS}.\n"
        f"{summary['seconds']:.0f} s, {summary['threads']} thread(s), {summary['arithmetic']}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    lines = [f"\nPicture: {out / 'accuracy.png'}   numbers: {out / 'results.json'}"]
    if KEPT in summary["methods"]:
        lines.append(f"Merged model, a folder that transformers loads: {out / KEPT}")
    lines += [
        f"Downloads are kept in {cache_folder()}.",
        f"\nThe same by yourself:   dirmerge merge {out / 'recipe.yml'} --out my-model",
        "where the recipe is\n",
        (out / "recipe.yml").read_text(encoding="utf-8"),
    ]
    show.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
