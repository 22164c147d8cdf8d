"""Trains every fine-tune, merges them by every method, scans λ on validation texts, reads the test once.

    python -m benchmarks.tasks --all                everything that the page has, as `make tasks`
    python -m benchmarks.tasks --sets pypi --kinds lora --seeds 0 1 2 [--study keep] [--methods …]

Downloads and checkpoints are kept in the cache folder (DIRMERGE_CACHE), results in benchmarks/results/tasks,
one file per set, kind and seed, row by row; what is there is not computed again, so an interrupted run goes
on where it stopped. `--out` of an empty folder measures everything anew. At the end the page
benchmarks/results/tasks.md is written from all results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks.tasks import alignment, report
from benchmarks.tasks.experiments import PLAN, STUDIES, VALIDATION_ONLY, Variant, rows_of
from benchmarks.tasks.setting import Setting, add_arguments, settings
from benchmarks.tasks.store import Row
from benchmarks.tasks.sweep import scan
from benchmarks.tasks.updates import merge, set_weights


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--study", choices=STUDIES, help="these settings instead of the tables' methods")
    parser.add_argument("--methods", nargs="+", help="only these rows; default all")
    parser.add_argument("--all", action="store_true", help="everything, whatever else is said")
    arguments = parser.parse_args(argv)
    if arguments.all:
        common = ["--threads", str(arguments.threads), "--out", str(arguments.out)]
        common += ["--accept-changed"] if arguments.accept_changed else []
        for words in PLAN:
            {"merge": main, "align": alignment.main}[words.split()[0]]([*words.split()[1:], *common])
        return
    for setting in settings(arguments):
        rows = rows_of(arguments.study, setting.kind)
        for row in arguments.methods or rows:
            measure(setting, row, rows[row], test=arguments.study not in VALIDATION_ONLY)
    report.write(arguments.out)


def measure(setting: Setting, name: str, variant: Variant, *, test: bool = True) -> Row:
    """One row: the merge, its scan of λ on validation texts, and the test texts at the best λ.

    Args:
        setting: the fine-tunes.
        name: of the row.
        variant: the method.
        test: whether the test texts are read; else the row has the scan alone.
    """

    def compute() -> Row:
        update = merge(setting.finetunes, variant)
        curve, best = [], 1.0
        if variant.method != "average":
            curve = scan(setting, update)
            best = max(curve, key=lambda point: point["normalised"])["scale"]
        row: Row = {
            "method": variant.method,
            "options": variant.options,
            "scale": best,
            "alignment": best * update.alignment,
            "norm": best * update.norm,
            "similarity": update.similarity,
            "merge_seconds": update.seconds,
            "threads": torch.get_num_threads(),
            "curve": curve,
        }
        if test:
            set_weights(setting.model, setting.base, update, best)
            row["test"] = setting.hits(setting.test)
        return row

    known = setting.results.get(name) is not None
    row = setting.results.once(name, compute)
    if not known:
        best = max((point["normalised"] for point in row["curve"]), default=float("nan"))
        rate = f", test {100 * setting.normalised(row['test']):.2f}" if "test" in row else ""
        print(
            f"{setting.name} {setting.kind} seed {setting.seed} {name}: λ {row['scale']:.3f}, "
            f"a(λD) {row['alignment']:.3f}, normalised % validation {100 * best:.2f}{rate}, "
            f"merged in {row['merge_seconds']:.2f} s",
            flush=True,
        )
    return row


if __name__ == "__main__":
    main()
