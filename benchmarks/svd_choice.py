"""Whether svd="auto" chooses well: the forms of the truncated SVD, and whole merges against their dense form.

    python -m benchmarks.svd_choice grid                      every form on every shape, spectrum and rank
    python -m benchmarks.svd_choice merges                    DC-Merge and TSV-M with "auto" against T SVDs
    python -m benchmarks.svd_choice rates                     the constants of dirmerge/linalg/cost.py
    python -m benchmarks.svd_choice grid --sizes 2048x2048 --tasks 2 8

The forms take turns, each result is checked before its time is kept, and what was measured replaces the same
rows of benchmarks/results/svd_choice.json; svd_choice.md beside it is written anew. Ratios are of the least
times, which other work on the machine disturbs least; medians stand beside them in the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dirmerge
from benchmarks import competitors
from benchmarks.pipelines import HEAD, HEAD_ENERGY, machine
from dirmerge.linalg import TruncatedSVD, cost, svd_truncated
from dirmerge.linalg._common import orthonormal

RESULTS = Path(__file__).parent / "results" / "svd_choice.json"
SIZES = ("1024x1024", "2048x2048", "5632x2048", "4096x4096")
TASKS = (2, 3, 4, 8)
SPECTRA = ("flat", "headed")
# A form whose first call takes longer is not called more than twice.
TWICE_FROM_S = 20.0
# What "auto" may take, relative to the best form.
ALLOWED = 1.10


def matrix(m: int, n: int, spectrum: str, seed: int = 0) -> Tensor:
    """Returns a Gaussian matrix of norm 1, "headed" with the leading directions of a fine-tuning delta."""
    generator = torch.Generator().manual_seed(m + n + seed)
    bulk = torch.randn(m, n, generator=generator)
    if spectrum == "flat":
        return bulk / bulk.norm()
    u, v = (torch.linalg.qr(torch.randn(size, HEAD, generator=generator)).Q for size in (m, n))
    s = torch.arange(1, HEAD + 1) ** -0.7
    s *= (HEAD_ENERGY / s.square().sum()).sqrt()
    return (u * s) @ v.mT + bulk * ((1 - HEAD_ENERGY) ** 0.5 / bulk.norm())


def alternate(
    forms: dict[str, Callable[[], Any]], check: Callable[[str, Any], None], runs: int
) -> dict[str, dict[str, float]]:
    """Times forms in turns, each result checked first; returns median, least and CPU seconds by form."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(runs):
        for name, form in forms.items():
            if len(times[name]) > 1 and times[name][0][0] > TWICE_FROM_S:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            result = form()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            check(name, result)
            del result
            times[name].append((wall, cpu))
    return {
        name: {
            "median_s": statistics.median(wall for wall, _ in found),
            "least_s": min(wall for wall, _ in found),
            "cpu_s": min(cpu for _, cpu in found),
        }
        for name, found in times.items()
    }


def leading_energy(a: Tensor, rank: int) -> float:
    """Returns the sum of the largest squared singular values, in float64."""
    a = (a if a.shape[0] >= a.shape[1] else a.mT).double()
    return float(torch.linalg.eigvalsh(a.mT @ a)[-rank:].sum())


def grid_row(m: int, n: int, spectrum: str, tasks: int, runs: int) -> dict[str, Any]:
    """Times all forms at one shape, spectrum and rank."""
    a = matrix(m, n, spectrum)
    rank = min(m, n) // tasks
    best = leading_energy(a, rank)
    methods: set[str] = set()

    def lapack() -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].mT

    def check(name: str, result: Any) -> None:
        u, _, v = (result.u, result.s, result.v) if isinstance(result, TruncatedSVD) else result
        captured = float((u.double().mT @ (a @ v).double()).square().sum())
        is_approximate = isinstance(result, TruncatedSVD) and result.method == "randomized"
        if name == "auto":
            methods.add(result.method)
        worst = max(float((x.mT @ x - torch.eye(rank)).norm()) for x in (u, v))
        if captured < (0.98 if is_approximate else 1 - 1e-5) * best or worst > 1e-3:
            raise SystemExit(f"{name} is wrong at {m} x {n}, {spectrum}: {captured / best:.6f}, {worst:.1e}")

    forms: dict[str, Callable[[], Any]] = {"lapack": lapack}
    for method in ("exact", "randomized", "auto"):
        forms[method] = lambda method=method: svd_truncated(a, rank, method)  # type: ignore[misc]
    times = alternate(forms, check, runs)
    row: dict[str, Any] = {"size": f"{m}x{n}", "spectrum": spectrum, "tasks": tasks, "chosen": methods.pop()}
    row["best"] = min(("lapack", "exact", "randomized"), key=lambda name: times[name]["least_s"])
    row["ratio"] = times["auto"]["least_s"] / times[row["best"]]["least_s"]
    return row | {"times": times}


def merge_row(m: int, n: int, spectrum: str, tasks: int, method: str, runs: int) -> dict[str, Any]:
    """Times one merge with "auto" against the method as published, with a full SVD per task."""
    deltas = [matrix(m, n, spectrum, seed) for seed in range(tasks)]
    rank = min(m, n) // tasks
    row: dict[str, Any] = {"size": f"{m}x{n}", "spectrum": spectrum, "tasks": tasks, "method": method}
    found: dict[str, Tensor] = {}
    best = [leading_energy(delta, rank) for delta in deltas]
    total = [float(delta.double().square().sum()) for delta in deltas]

    def dense() -> Tensor:
        if method == "tsv_m":
            return competitors.tsv_m(deltas, rank)
        return competitors.dc_merge(deltas, rank, average=False, size=min(m, n))

    def check(name: str, result: Any) -> None:
        if name == "dense":
            found["dense"] = result
            return
        value, truth = result.dense().flatten(), found["dense"].flatten()
        row["cosine"] = float(value @ truth / (value.norm() * truth.norm()))
        row["notes"] = result.record.notes + result.record.fallbacks
        least = min(e * t / b for e, t, b in zip(result.record.energy, total, best, strict=True))
        # The leading directions of a flat spectrum are hardly determined, their energy is.
        if row["cosine"] < 0.3 or least < 0.98:
            raise SystemExit(f"{method} with auto is not the dense result: energy {least:.4f}, {row}")

    forms: dict[str, Callable[[], Any]] = {
        "dense": dense,
        "auto": lambda: dirmerge.merge_deltas(deltas, method),
    }
    row["times"] = alternate(forms, check, runs)
    row["ratio"] = row["times"]["auto"]["least_s"] / row["times"]["dense"]["least_s"]
    return row


def rates(sizes: list[tuple[int, int]]) -> None:
    """Prints each stage's time relative to a float32 GEMM of the same size."""
    for n in sorted({min(size) for size in sizes}):
        generator = torch.Generator().manual_seed(n)
        a, tall, thin = (
            torch.randn(*shape, generator=generator) for shape in ((n, n), (2 * n, n), (n, n // 4))
        )
        gram, small = a.mT @ a, torch.eye(n // 4)
        stages: dict[str, tuple[Callable[[], Any], float]] = {
            "gemm": (lambda a=a: a @ a, 1.0),  # type: ignore[misc]
            "gram": (lambda a=a: dirmerge.ops.gram(a), 1.0),  # type: ignore[misc]
            "eigh": (lambda gram=gram: torch.linalg.eigh(gram), 1.0),  # type: ignore[misc]
            "svd": (lambda a=a: torch.linalg.svd(a, full_matrices=False), 1.0),  # type: ignore[misc]
            "svd of twice the rows": (lambda a=tall: torch.linalg.svd(a, full_matrices=False), 1.0),  # type: ignore[misc]
            "both passes of CholeskyQR, a quarter": (lambda y=thin: orthonormal(y), 1 / 16),  # type: ignore[misc]
            "triangular solve, a quarter": (
                lambda y=thin, r=small: torch.linalg.solve_triangular(r, y, upper=True, left=False),  # type: ignore[misc]
                1 / 16,
            ),
        }
        forms = {name: stage for name, (stage, _) in stages.items()}
        found = alternate(forms, lambda name, result: None, 5)
        unit = found["gemm"]["least_s"]
        relative = (
            f"{name} {found[name]['least_s'] / unit / share:.2f}" for name, (_, share) in stages.items()
        )
        print(f"{n}: {2 * n**3 / unit / 1e9:.0f} GFLOP/s; " + ", ".join(relative), flush=True)


def predicted(size: str, tasks: int) -> str:
    """The predicted costs of LAPACK, the Gram form and the randomized one, relative to LAPACK's."""
    m, n = map(int, size.split("x"))
    rank = min(m, n) // tasks
    forms: tuple[cost.Form, ...] = ("lapack", "gram", "randomized")
    costs = [cost.form_cost(m, n, rank, form) for form in forms]
    return " : ".join(f"{value / costs[0]:.2f}" for value in costs)


def report(results: dict[str, Any]) -> str:
    """Renders what was measured."""
    lines = ["# The choice of a truncated SVD", "", "Written by `python -m benchmarks.svd_choice`.", ""]
    if "grid" in results:
        where = f"On {results['machines']['grid']}. Rank min(m, n) / T; least of the runs, in seconds. "
        lines += [
            where + "Model: LAPACK : exact : randomized.",
            "",
            "| matrix | spectrum | T | LAPACK | exact | randomized | auto | chosen | auto / best | model |",
            "|" + "---|" * 10,
        ]
        for row in results["grid"]:
            times = row["times"]
            seconds = " | ".join(
                f"{times[name]['least_s']:.3f}" for name in ("lapack", "exact", "randomized", "auto")
            )
            lines.append(
                f"| {row['size'].replace('x', ' × ')} | {row['spectrum']} | {row['tasks']} | {seconds} "
                f"| {row['chosen']} | {row['ratio']:.2f} | {predicted(row['size'], row['tasks'])} |"
            )
        lines.append("")
    if "merges" in results:
        lines += [
            f"Whole merges on {results['machines']['merges']}; least of the runs, in seconds.",
            "",
            "| method | matrix | spectrum | T | dense | auto | auto / dense | cosine |",
            "|" + "---|" * 8,
        ]
        lines += [
            f"| {row['method']} | {row['size'].replace('x', ' × ')} | {row['spectrum']} | {row['tasks']} "
            f"| {row['times']['dense']['least_s']:.2f} | {row['times']['auto']['least_s']:.2f} "
            f"| {row['ratio']:.2f} | {row['cosine']:.3f} |"
            for row in results["merges"]
        ]
        lines.append("")
    return "\n".join(lines)


def keep(part: str, row: dict[str, Any]) -> None:
    """Puts a row in the place of an earlier one of the same case, and renders the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    case = [row.get(key) for key in ("method", "size", "spectrum", "tasks")]
    others = [
        old
        for old in results.get(part, [])
        if [old.get(key) for key in ("method", "size", "spectrum", "tasks")] != case
    ]
    size = {name: place for place, name in enumerate(SIZES)}
    results[part] = sorted(
        [*others, row],
        key=lambda r: (r.get("method", ""), size.get(r["size"], len(size)), r["spectrum"], r["tasks"]),
    )
    results.setdefault("machines", {})[part] = machine()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(report(results))


def main() -> None:
    """Measures one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["grid", "merges", "rates"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), metavar="MxN")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS))
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA))
    parser.add_argument("--methods", nargs="+", choices=["dc_merge", "tsv_m"], default=["dc_merge", "tsv_m"])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [(int(m), int(n)) for m, n in (size.split("x") for size in arguments.sizes)]
    if arguments.part == "rates":
        rates(sizes)
        return
    missed = False
    for m, n in sizes:
        for spectrum in arguments.spectra:
            for tasks in arguments.tasks:
                for method in arguments.methods if arguments.part == "merges" else ("",):
                    if method:
                        row = merge_row(m, n, spectrum, tasks, method, arguments.runs)
                    else:
                        row = grid_row(m, n, spectrum, tasks, arguments.runs)
                    keep(arguments.part, row)
                    missed |= row["ratio"] > (1.0 if method else ALLOWED)
                    times = ", ".join(f"{k} {v['least_s']:.3f} s" for k, v in row["times"].items())
                    print(
                        f"{m} x {n}, {spectrum}, T = {tasks} {method}: {times}; {row['ratio']:.2f}",
                        flush=True,
                    )
    if missed:
        raise SystemExit("a ratio is above what it may be")


if __name__ == "__main__":
    main()
