"""Trains every fine-tune, merges them by every method, scans λ on validation texts, reads the test once.

python -m benchmarks.tasks [--kinds lora full] [--seeds 0 1 2] [--set pypi|debian] [--study frames] …

Everything is kept in the cache folder (DIRMERGE_CACHE) and what is there is not computed again, so an
interrupted run goes on where it stopped. The tables of all runs in the cache go to
benchmarks/results/tasks.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.tasks import debian, report
from benchmarks.tasks.sweep import (
    ADAPTER_VARIANTS,
    STUDIES,
    VARIANTS,
    FineTunes,
    evaluate,
    load_finetunes,
    mean,
    merge,
    scan,
    set_weights,
)
from benchmarks.tasks.train import RECIPES, train
from dirmerge.demo.data import TASKS, TaskData, prepare
from dirmerge.demo.evaluate import Probe, make_probe
from dirmerge.demo.model import Tokenizer, bfloat16_pays, load_encoder
from dirmerge.demo.sources import Archives

SETS = {
    "pypi": tuple(TASKS),
    "debian": ("movie", "icd10", "hscode", "city", *debian.TASKS),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--set", choices=SETS, default="pypi", help="the tasks; debian needs apt-get, dpkg-deb"
    )
    parser.add_argument("--kinds", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", help="only these rows of the tables; default all")
    parser.add_argument("--study", choices=STUDIES, help="these settings instead of the tables' methods")
    parser.add_argument("--validation-texts", type=int, default=120, help="per task, for the scan of λ")
    parser.add_argument("--test-texts", type=int, default=600, help="per task")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    archives = Archives()
    archives.fetch()
    base_folder = archives.base_model()
    tasks = [_prepare(name, archives) for name in SETS[arguments.set]]
    for kind in arguments.kinds:
        for seed in arguments.seeds:
            folders = _train_all(tasks, base_folder, archives.folder, kind, seed)
            _measure(arguments, tasks, folders, base_folder, archives.folder, kind, seed)
    report.write(archives.folder / "results", arguments.out)


def _prepare(name: str, archives: Archives) -> TaskData:
    return prepare(name, archives) if name in TASKS else debian.prepare(name, archives.folder)


def _train_all(
    tasks: list[TaskData], base_folder: Path, cache: Path, kind: str, seed: int
) -> dict[str, Path]:
    folders = {task.name: cache / "checkpoints" / f"{kind}-s{seed}" / task.name for task in tasks}
    for task in tasks:
        if not folders[task.name].is_dir():
            out, recipe = folders[task.name], RECIPES[kind]
            record = train(task, base_folder, out, recipe, seed, bf16=bfloat16_pays())
            loss, seconds = record["loss"], record["seconds"]
            print(f"trained {kind} {task.name} seed {seed}: {seconds:.0f} s, loss {loss:.3f}", flush=True)
    return folders


def _measure(
    arguments: argparse.Namespace,
    tasks: list[TaskData],
    folders: dict[str, Path],
    base_folder: Path,
    cache: Path,
    kind: str,
    seed: int,
) -> None:
    texts = (arguments.validation_texts, arguments.test_texts)
    folder = cache / "results" / f"{arguments.set}-{kind}-s{seed}-{texts[0]}-{texts[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    base = load_file(base_folder / "model.safetensors")
    model = load_encoder(base_folder)
    tokenizer = Tokenizer(base_folder)
    validation = [make_probe(task, "validation", model, tokenizer, texts=texts[0]) for task in tasks]
    test = [make_probe(task, "test", model, tokenizer, texts=texts[1]) for task in tasks]
    finetunes = load_finetunes(kind, folders, base)
    bf16 = bfloat16_pays()

    own = _once(folder / "own.json", lambda: _own(model, base, finetunes, validation, test, bf16))
    variants = ADAPTER_VARIANTS if kind == "lora" else VARIANTS
    if arguments.study is not None:
        variants = STUDIES[arguments.study][kind]
    for name in arguments.methods or variants:
        method, options = variants[name]

        def run(method: str = method, options: dict[str, object] = options) -> dict[str, Any]:
            update = merge(finetunes, method, options)
            own_accuracy = {task: mean(bits) for task, bits in own["own_validation"].items()}
            curve = []
            best = 1.0
            if method != "average":
                curve = scan(model, base, update, kind, validation, own_accuracy, bf16=bf16)
                best = max(curve, key=lambda row: row["normalised"])["scale"]
            set_weights(model, base, update, best)
            return {
                "method": method,
                "options": options,
                "scale": best,
                "alignment": best * update.alignment,
                "merge_seconds": update.seconds,
                "threads": torch.get_num_threads(),
                "curve": curve,
                "test": evaluate(model, test, bf16=bf16),
            }

        result = _once(folder / f"{name.replace(' ', '_')}.json", run)
        rate = sum(mean(b) / mean(own["own_test"][t]) for t, b in result["test"].items()) / len(tasks)
        print(
            f"{arguments.set} {kind} seed {seed} {name}: λ {result['scale']:.3f}, "
            f"a(λD) {result['alignment']:.3f}, normalised {100 * rate:.2f} %, "
            f"merged in {result['merge_seconds']:.2f} s",
            flush=True,
        )


def _own(
    model: torch.nn.Module,
    base: dict[str, torch.Tensor],
    finetunes: FineTunes,
    validation: list[Probe],
    test: list[Probe],
    bf16: bool,
) -> dict[str, Any]:
    """Test results of the base, and validation and test results of every task's own fine-tune."""
    set_weights(model, base, None)
    result: dict[str, Any] = {"base_test": evaluate(model, test, bf16=bf16)}
    result |= {"own_validation": {}, "own_test": {}}
    for t, name in enumerate(finetunes.tasks):
        set_weights(model, base, finetunes.single(t))
        result["own_validation"] |= evaluate(model, [validation[t]], bf16=bf16)
        result["own_test"] |= evaluate(model, [test[t]], bf16=bf16)
        print(f"own {finetunes.kind} {name}: {100 * mean(result['own_test'][name]):.1f} %", flush=True)
    return result


def _once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON at `path`, computed and written first if it is not there."""
    if not path.is_file():
        start = time.perf_counter()
        result = compute() | {"seconds": 0.0}
        result["seconds"] = time.perf_counter() - start
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        partial.replace(path)
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


if __name__ == "__main__":
    main()
