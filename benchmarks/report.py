"""Writes one page of every measured number, or compares two runs of the benchmarks.

    python -m benchmarks.report                                 results/README.md, from the JSON beside it
    python -m benchmarks.report --against OLD.json [NEW.json]   case by case; NEW: results/bench_cpu.json

The page has the pipelines of benchmarks.pipelines, the accuracies of benchmarks.tasks.fidelity, and the ops
and algorithms of `make bench`, each with the machine it ran on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.pipelines import report as render_pipelines
from benchmarks.shapes import FAMILIES

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "README.md"
# What the others are measured against, in the order in which it is looked for.
REFERENCES = ("torch", "torch.linalg.svd", "dense")
CLOCKS = {
    "perf_counter": "wall time",
    "process_time": "CPU time of one process, on a busy machine,",
    "synchronised": "wall time between synchronisations with the GPU",
}

Entry = dict[str, Any]
Case = tuple[str, str, str]


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(header: str, rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table, the first columns flush left, and an empty line."""
    columns = header.split(" | ")
    marks = ["---"] * left + ["---:"] * (len(columns) - left)
    lines = [columns, marks, *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def seconds(value: float) -> str:
    """Three digits in the unit that suits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def cases(run: dict[str, Any]) -> dict[Case, dict[str, Entry]]:
    """The measurements of a run by (op, case, dtype), then by implementation."""
    found: dict[Case, dict[str, Entry]] = {}
    for entry in run["benchmarks"]:
        info = entry["extra_info"]
        if "implementation" not in info:
            # A benchmark of something else, with numbers of its own.
            continue
        key = info["op"], info["case"], info["dtype"]
        found.setdefault(key, {})[info["implementation"]] = entry
    return found


def families(run: dict[str, Any]) -> list[str]:
    """The shape families that a run has cases of."""
    texts = [case for _, case, _ in cases(run)]
    return [name for name in FAMILIES if any(name in text for text in texts)]


def median(entry: Entry) -> float:
    return float(entry["stats"]["median"])


def _roof(entry: Entry) -> str:
    """How near an entry comes to the machine's measured limits: the larger fraction, and of what."""
    info = entry["extra_info"]
    fractions = {"copy": info.get("of_copy", 0), "GEMM": info.get("of_gemm", 0)}
    limit = max(fractions, key=lambda name: fractions[name])
    return f"{100 * fractions[limit]:.0f} % of {limit}"


def microbenchmarks(run: dict[str, Any]) -> list[str]:
    """A table per op: the median of every implementation, the best one's ratio and distance to its roof."""
    by_op: dict[str, dict[Case, dict[str, Entry]]] = {}
    for key, entries in cases(run).items():
        by_op.setdefault(key[0], {})[key] = entries
    about = run["machine_info"]["dirmerge"]
    timers = {str(entry["options"]["timer"]).split(".")[-1].strip("'>") for entry in run["benchmarks"]}
    clock = ", ".join(CLOCKS.get(timer, timer) for timer in sorted(timers))
    lines = [
        f"Machine: {machine.line(about)}.",
        f"Medians of {clock} over the rounds of one run, all implementations of a case side by side, every",
        "result checked before it was timed.",
        f"Shape families in this run: {', '.join(families(run))}; all of them are {', '.join(FAMILIES)}.",
        "",
    ]
    for threads, peaks in about["peaks"].items():
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks.items() if name != "copy")
        lines.append(
            f"Measured at the start, {threads} {'thread' if threads == '1' else 'threads'}: copy "
            f"{peaks['copy'] / 1e9:.1f} GB/s read and written; GEMM in GFLOP/s: {rates}."
        )
    lines += [
        "",
        "The ratio is that of the first column to the best other one. The last column counts each input",
        "and output once against the copy, and the FLOP of the method (of factorisations about) against a",
        "GEMM of the dtype they are computed in (float32 for 16-bit inputs on a CPU): the nearer limit, for",
        "the best. Small inputs stay in the cache, which is faster than a copy of what does not fit it.",
        "",
    ]
    for op, found in sorted(by_op.items()):
        names = list(dict.fromkeys(name for entries in found.values() for name in entries))
        names.sort(key=lambda name: (name not in REFERENCES, name))
        rows = []
        for (_, case, dtype), entries in found.items():
            own = [entries[name] for name in names if name in entries and name not in REFERENCES]
            reference = next((entries[name] for name in REFERENCES if name in entries), None)
            best = min(own or list(entries.values()), key=median)
            ratio = f"{median(reference) / median(best):.2f}" if reference and own else ""
            times = [seconds(median(entries[name])) if name in entries else "" for name in names]
            rows.append([case, dtype, *times, ratio, _roof(best)])
        header = " | ".join(["case", "dtype", *names, "ratio", "best reaches"])
        lines += [f"### {op}", "", *table(header, rows, left=2)]
    return lines


def pipelines(results: dict[str, Any]) -> list[str]:
    """The tables of benchmarks.pipelines, one level below this page's headings."""
    lines = render_pipelines(results).splitlines()[1:]
    return [f"#{line}" if line.startswith("## ") else line for line in lines]


def fidelity(results: dict[str, Any]) -> list[str]:
    """Accuracies of merges with randomized SVDs against exact ones: means over the tasks, then over seeds."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        by_method.setdefault(row["method"], []).append(row)

    def mean(values: Iterable[float]) -> float:
        found = list(values)
        return sum(found) / len(found)

    rows = []
    for method, found in by_method.items():
        exact, randomized = (
            mean(mean(row[kind].values()) for row in found) for kind in ("exact", "randomized")
        )
        cells = f"{exact:.2f}", f"{randomized:.2f}", f"{mean(row['difference'] for row in found):+.2f}"
        seeds = ", ".join(str(row["seed"]) for row in found)
        rows.append((method, seeds, *cells, f"{mean(row['cosine'] for row in found):.3f}"))
    header = "method | seeds | exact | randomized | difference | cosine of the updates"
    total = (
        f"Over all: {results['mean_difference']:+.3f} points on average, "
        f"{results['mean_absolute_difference']:.3f} in absolute value."
    )
    return [*table(header, rows, left=2), total, ""]


def other_machines(folder: Path, runs: dict[str, dict[str, Any]]) -> str:
    """Says what ran on another CPU or with other threads than the pipelines; else empty."""
    if not (folder / "pipelines.json").exists():
        return ""
    machine_of_pipelines = " and ".join(sorted(set(load(folder / "pipelines.json")["machines"].values())))
    found = []
    for run in runs.values():
        about = run["machine_info"]["dirmerge"]
        threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
        if about["cpu"] not in machine_of_pipelines or f"with {threads}" not in machine_of_pipelines:
            found.append(f"ops and algorithms on {about['cpu']} with {threads}")
    return f"pipelines on {machine_of_pipelines}; {'; '.join(found)}" if found else ""


def page(folder: Path = RESULTS) -> str:
    """Renders everything that is measured in a folder."""
    runs = {
        name: load(folder / f"bench_{name}.json")
        for name in ("cpu", "cuda")
        if (folder / f"bench_{name}.json").exists()
    }
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.report` from the JSON beside it; nothing here is estimated. What",
        "is predicted for GPUs is in [roofline.md](roofline.md), the resources and numeric errors of the",
        "kernels in [kernels.md](kernels.md), the merges of real models in [tasks.md](tasks.md), whole",
        "commands against `cat` and `cp` in [throughput.md](throughput.md).",
        "",
    ]
    if "cuda" not in runs:
        lines += ["**No GPU: nothing below ran on one, and the speed of the GPU kernels is unmeasured.**", ""]
    elsewhere = other_machines(folder, runs)
    if elsewhere:
        lines += [f"**Not everything ran under the same conditions:** {elsewhere}.", ""]
    if (folder / "pipelines.json").exists():
        lines += ["## Pipelines", *pipelines(load(folder / "pipelines.json")), ""]
    if (folder / "fidelity.json").exists():
        lines += [
            "## Randomized against exact SVDs on real fine-tunes, accuracy in per cent",
            "",
            *fidelity(load(folder / "fidelity.json")),
        ]
    for name, run in runs.items():
        lines += [f"## Ops and algorithms, {'GPU' if name == 'cuda' else 'CPU'}", "", *microbenchmarks(run)]
    return "\n".join(lines).rstrip() + "\n"


def _noise(entry: Entry) -> float:
    """How far a median may be from the next run's: the rounds' spread relative to it, at least 5 per cent."""
    stats = entry["stats"]
    return max(0.05, float(stats["iqr"]) / float(stats["median"])) if stats["rounds"] >= 5 else 0.2


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Says where machines differ and what needs a comment: about the two runs, before any number."""
    first, second = (run["machine_info"]["dirmerge"] for run in (old, new))
    names = sorted({*first, *second} - {"peaks"})
    return [f"{n}: {first.get(n)} → {second.get(n)}" for n in names if first.get(n) != second.get(n)]


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Renders two runs case by case: old over new, and which changed by more than the noise of both."""
    lines = ["# Two runs, case by case", ""]
    changed = differences(old, new)
    if changed:
        lines += [
            "**The two runs differ in more than the code:**",
            "",
            *(f"- {line}" for line in changed),
            "",
        ]
    else:
        lines += [f"Machine of both: {machine.line(new['machine_info']['dirmerge'])}.", ""]
    before, after = (
        {(*key, name): entry for key, found in cases(run).items() for name, entry in found.items()}
        for run in (old, new)
    )
    rows = []
    for key in sorted(before.keys() & after.keys()):
        ratio = median(before[key]) / median(after[key])
        noise = _noise(before[key]) + _noise(after[key])
        verdict = "faster" if ratio > 1 + noise else "slower" if ratio < 1 / (1 + noise) else ""
        times = seconds(median(before[key])), seconds(median(after[key]))
        rows.append((*key, *times, f"{ratio:.2f}", f"±{100 * noise:.0f} %", verdict))
    moved = [row for row in rows if row[-1]]
    lines.append(f"{len(rows)} cases in both, {len(moved)} changed by more than the noise of their rounds.")
    lines.append("")
    header = "op | case | dtype | implementation | old | new | old / new | noise | verdict"
    lines += table(header, [*moved, *(row for row in rows if not row[-1])], left=4)
    for title, only in (
        ("Only in the old run", before.keys() - after.keys()),
        ("New", after.keys() - before.keys()),
    ):
        if only:
            lines += [f"{title}: {len(only)} cases of {', '.join(sorted({key[0] for key in only}))}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Writes the page, or prints a comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, nargs="?", default=RESULTS / "bench_cpu.json", metavar="NEW.json")
    arguments = parser.parse_args()
    if arguments.against:
        print(compare(load(arguments.against), load(arguments.new)), end="")
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
