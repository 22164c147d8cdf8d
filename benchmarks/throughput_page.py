"""Renders results/throughput.md from the rows that benchmarks.throughput measured, those of all machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, synthetic
from benchmarks.report import seconds, table

RESULTS = Path(__file__).parent / "results" / "throughput"
MAX_MEMORY = 1 / 8
"""What a merge may take of mergekit's peak."""

Row = dict[str, Any]


def _goal(row: Row, sign: str, value: float, goal: float | None = None) -> str:
    """A goal and whether a value meets it; empty for inputs that have no goal."""
    if row["must"] is None:
        return ""
    goal = row["must"] if goal is None else goal
    is_met = value <= goal if sign == "≤" else value >= goal
    return f"{sign} {goal:.3g}, {'met' if is_met else '**missed**'}"


def _billions(row: Row) -> str:
    return f"{row['parameters'] / 1e9:.2f} G"


def _copy_cells(row: Row) -> list[str]:
    return [
        *(f"{row[key]:.2f} GB" for key in ("read_gb", "written_gb")),
        *(seconds(row[key]) for key in ("cat_s", "cp_s", "seconds", "cpu_s")),
        f"{row['ratio']:.1f}",
        _goal(row, "≤", row["ratio"]),
        f"{row['peak_mb']:.0f} MB",
    ]


def _models_cells(row: Row) -> list[str]:
    return [row["method"], _billions(row), *_copy_cells(row)]


def _adapters_cells(row: Row) -> list[str]:
    return [f"{row['adapters']} of rank {row['rank']}", *_copy_cells(row)]


def _mergekit_cells(row: Row) -> list[str]:
    return [
        row["method"],
        _billions(row),
        *(seconds(row[key]) for key in ("mergekit_s", "mergekit_cpu_s", "seconds", "cpu_s")),
        f"{row['faster']:.1f}",
        _goal(row, "≥", row["faster"]),
        *(f"{row[key]:.0f} MB" for key in ("mergekit_mb", "peak_mb")),
        f"{row['memory']:.3f}",
        _goal(row, "≤", row["memory"], MAX_MEMORY),
        f"{row['difference']:.3f}",
    ]


def _memory_cells(row: Row) -> list[str]:
    if "refused" in row:
        return [row["method"], _billions(row), row["budget"], "", "", f"refused: {row['refused']}"]
    verdict = "met" if row["peak_mb"] <= row["budget_mb"] else "**missed**"
    peak, spent = f"{row['peak_mb']:.0f} MB", seconds(row["seconds"])
    return [row["method"], _billions(row), row["budget"], peak, spent, verdict]


def _many_cells(row: Row) -> list[str]:
    return [
        str(row["models"]),
        *(seconds(row[key]) for key in ("start_s", "two_models_s", "seconds", "per_model_s")),
        _goal(row, "≤", row["seconds"]),
        f"{row['peak_mb']:.0f} MB",
    ]


def _cover_cells(row: Row) -> list[str]:
    return [
        f"{row['tasks']} of {row['size']}²",
        *(seconds(row[key]) for key in ("dense_s", "seconds")),
        f"{row['faster']:.2f}",
        _goal(row, "≥", row["faster"]),
        f"{row['energy']:.4f}",
        f"{row['cosine']:.3f}",
    ]


class Section(NamedTuple):
    """One part of the page.

    Attributes:
        title: its heading.
        about: what the columns hold.
        header: names of the columns.
        cells: one row of the table.
    """

    title: str
    about: str
    header: str
    cells: Callable[[Row], list[str]]


_COPY = "read | written | `cat` | `cp` | dirmerge | its CPU | ratio | must | peak"
SECTIONS = {
    "models": Section(
        title="Three full fine-tunes against `cat` and `cp`",
        about=f"""\
The ratio is that of the merge to `cat` of the inputs plus `cp` of the output. λ is {synthetic.SCALE}, the
density of TIES {synthetic.DENSITY}. Sampled rows of every kind of tensor are within one rounding to bfloat16
of the formula in float64.""",
        header=f"method | parameters | {_COPY}",
        cells=_models_cells,
    ),
    "mergekit": Section(
        title="The same merges by mergekit",
        about="""\
Both get the same recipe. The difference is that of the two updates relative to the norm of dirmerge's:
mergekit subtracts in bfloat16. The peak of mergekit includes pages of the files that it maps. The memory is
the ratio of the peaks.""",
        header="method | parameters | mergekit | its CPU | dirmerge | its CPU | times faster | must | "
        "peak of mergekit | peak | memory | must | difference",
        cells=_mergekit_cells,
    ),
    "memory": Section(
        title="Peak memory under `--memory`",
        about="The peak must not exceed the budget.",
        header="method | parameters | budget | peak | dirmerge | result",
        cells=_memory_cells,
    ),
    "adapters": Section(
        title="Eight adapters of 7B shape into one adapter",
        about="The sum of the adapters, with `--as adapter`. The ratio is as above.",
        header=f"adapters | {_COPY}",
        cells=_adapters_cells,
    ),
    "many": Section(
        title="Many small models",
        about="""\
The average of models of three tensors 8 × 8. The start-up is `dirmerge --help`; the time per model is that
beyond the merge of two of them. The goal is in seconds.""",
        header="models | start-up | two models | dirmerge | per model | must | peak",
        cells=_many_cells,
    ),
    "cover": Section(
        title="DC-Merge of full fine-tunes against its dense form",
        about="""\
The dense form takes T + 2 full SVDs. The energy is the least of the tasks', as a fraction of the best at
that rank; the cosine is that of the two updates.""",
        header="matrices | dense | dirmerge | times faster | must | energy | cosine",
        cells=_cover_cells,
    ),
}


def page(folder: Path = RESULTS) -> str:
    """Renders the rows of all machines."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [
        "# Whole commands",
        "",
        "Written by `python -m benchmarks.throughput` from the JSON in throughput/. The inputs are",
        "synthetic, in bfloat16, and in the page cache. Times are medians of wall time, and of CPU",
        "time where so named: on a busy machine they differ. Peaks are of resident memory.",
        "",
    ]
    if not files:
        lines += ["**Nothing is measured yet.**"]
    for part, section in SECTIONS.items():
        by_machine: dict[str, list[list[str]]] = {}
        for row in (row for content in files for row in content.get(part, [])):
            by_machine.setdefault(machine.line(row["machine"]), []).append(section.cells(row))
        if by_machine:
            lines += [f"## {section.title}", "", section.about, ""]
        for about, rows in by_machine.items():
            lines += [f"On {about}.", "", *table(section.header, rows)]
    return "\n".join(lines).rstrip() + "\n"
