"""Randomized against exact decompositions on the real full fine-tunes: accuracy of every spectral method.

    python -m benchmarks.tasks.fidelity [--seeds 0 1 2]

Works on the full fine-tunes of the eight tasks, trained where the cache has none. Every method merges at its
default scale; results go to benchmarks/results/fidelity.json as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.tasks.experiments import Variant
from benchmarks.tasks.setting import Setting
from benchmarks.tasks.store import FOLDER
from benchmarks.tasks.updates import evaluate, mean, merge, set_weights
from dirmerge.demo.sources import Archives
from dirmerge.methods import get_method

RESULTS = Path(__file__).parents[1] / "results" / "fidelity.json"
METHODS = ("dc_merge", "tsv_m", "mda", "iso_cts")


def main() -> None:
    """Evaluates every method in both modes for every seed and prints the differences."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.fidelity")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    archives = Archives()
    archives.fetch()
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["seed"], row["method"]) for row in rows}
    for seed in arguments.seeds:
        setting = Setting("pypi", "full", seed, archives, FOLDER)
        for method in METHODS:
            if (seed, method) in done:
                continue
            row: dict[str, Any] = {"seed": seed, "method": method}
            target = get_method(method).default_scale(False, len(setting.set.merged)).alignment
            assert target is not None  # spectral methods are scaled by alignment
            updates = {
                svd: merge(setting.finetunes, Variant(method, {"svd": svd}))
                for svd in ("exact", "randomized")
            }
            for svd, update in updates.items():
                set_weights(setting.model, setting.base, update, target / update.alignment)
                hits = evaluate(setting.model, setting.test, bf16=setting.bf16)
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
