"""Randomized against exact decompositions on the real full fine-tunes: accuracy of every spectral method.

    python -m benchmarks.tasks.fidelity [--seeds 0 1 2]

Needs the fine-tunes of `python -m benchmarks.tasks --kinds full` in the cache. Every method merges at its
default scale; results go to benchmarks/results/fidelity.json as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.tasks.sweep import evaluate, load_finetunes, mean, merge, set_weights
from dirmerge.demo.data import TASKS, prepare
from dirmerge.demo.evaluate import make_probe
from dirmerge.demo.model import Tokenizer, bfloat16_pays, load_encoder
from dirmerge.demo.sources import Archives
from dirmerge.methods import get_method

RESULTS = Path(__file__).parents[1] / "results" / "fidelity.json"
METHODS = ("dc_merge", "tsv_m", "mda", "iso_cts")


def main() -> None:
    """Evaluates every method in both modes for every seed and prints the differences."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.fidelity")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test-texts", type=int, default=600, help="per task")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    archives = Archives()
    archives.fetch()
    folder = archives.base_model()
    base, model, tokenizer = load_file(folder / "model.safetensors"), load_encoder(folder), Tokenizer(folder)
    tasks = [prepare(name, archives) for name in TASKS]
    probes = [make_probe(task, "test", model, tokenizer, texts=arguments.test_texts) for task in tasks]
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["seed"], row["method"]) for row in rows}
    for seed in arguments.seeds:
        folders = {t.name: archives.folder / "checkpoints" / f"full-s{seed}" / t.name for t in tasks}
        missing = [str(path) for path in folders.values() if not path.is_dir()]
        if missing:
            raise SystemExit(f"not trained yet: {', '.join(missing)}; run python -m benchmarks.tasks first")
        if all((seed, method) in done for method in METHODS):
            continue
        finetunes = load_finetunes("full", folders, base)
        for method in METHODS:
            if (seed, method) in done:
                continue
            row: dict[str, Any] = {"seed": seed, "method": method}
            target = get_method(method).default_scale(adapters=False).alignment
            assert target is not None  # spectral methods are scaled by alignment
            updates = {svd: merge(finetunes, method, {"svd": svd}) for svd in ("exact", "randomized")}
            for svd, update in updates.items():
                set_weights(model, base, update, target / update.alignment)
                hits = evaluate(model, probes, bf16=bfloat16_pays())
                row[svd] = {task: 100 * mean(bits) for task, bits in hits.items()}
            dot = norms = other = 0.0
            for name, exact in updates["exact"].scaled.items():
                found = updates["randomized"].scaled[name].double()
                dot += float((exact.double() * found).sum())
                norms += float(exact.double().square().sum())
                other += float(found.square().sum())
            row["cosine"] = dot / (norms * other) ** 0.5
            row["difference"] = statistics.mean(row["randomized"].values()) - statistics.mean(
                row["exact"].values()
            )
            rows.append(row)
            write(rows)
            print(f"seed {seed} {method}: {row['difference']:+.2f} points, cosine {row['cosine']:.3f}")


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the rows with the mean difference over all of them."""
    differences = [row["difference"] for row in rows]
    result = {
        "rows": rows,
        "mean_difference": statistics.mean(differences),
        "mean_absolute_difference": statistics.mean(map(abs, differences)),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
