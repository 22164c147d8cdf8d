"""The demo's picture: average accuracy per model beside the accuracy on each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LABELS = {
    "average": "Average",
    "task_arithmetic": "Task Arithmetic",
    "ties": "TIES",
    "wudi": "WUDI (exact)",
    "tsv_m": "TSV-M",
    "mda": "MDA",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "dc_merge": "DC-Merge",
}


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a demo's results: models from worst to best, the own adapters as the ceiling.

    Args:
        summary: what `dirmerge.demo.run.main` returns.
        path: the PNG file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks = list(summary["tasks"])
    ranked = sorted(summary["methods"].items(), key=lambda item: item[1]["average"])
    rows = [("Base model", summary["base"])]
    rows += [(LABELS.get(name, name), row) for name, row in ranked]
    rows += [("Each task's own adapter", summary["own_adapters"])]
    own = summary["own_adapters"]["accuracy"]
    error = 100 * summary["standard_error_of_average"]
    positions = list(range(len(rows)))[::-1]
    fixed = {0, len(rows) - 1}

    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(3.6 + 0.78 * (len(tasks) + 4), 1.4 + 0.38 * len(rows)), layout="constrained")
        bars, cells = figure.subplots(1, 2, width_ratios=[1, 0.26 * len(tasks)], sharey=True)
        values = [100 * row["average"] for _, row in rows]
        colours = ["#9aa5b1" if i in fixed else "#2b6cb0" for i in range(len(rows))]
        bars.barh(positions, values, color=colours, height=0.66, xerr=error, ecolor="#1a202c", capsize=2)
        for position, value in zip(positions, values, strict=True):
            bars.text(2, position, f"{value:.1f}", va="center", color="white", weight="bold")
        bars.set_yticks(positions, [label for label, _ in rows])
        bars.set_xlim(0, 100)
        bars.set_xlabel("average accuracy, %")
        bars.set_title("Average over tasks", loc="left")
        bars.spines[["top", "right"]].set_visible(False)

        shares = [[row["accuracy"][task] / own[task] for task in tasks] for _, row in rows[::-1]]
        image = cells.imshow(shares, cmap="YlGnBu", vmin=0.4, vmax=1.0, aspect="auto", origin="lower")
        for position, (_, row) in zip(positions, rows, strict=True):
            for column, task in enumerate(tasks):
                dark = row["accuracy"][task] / own[task] > 0.8
                text = f"{100 * row['accuracy'][task]:.0f}"
                cells.text(
                    column, position, text, ha="center", va="center", color="white" if dark else "#1a202c"
                )
        cells.set_xticks(range(len(tasks)), tasks)
        cells.tick_params(left=False, bottom=False)
        cells.set_title("Accuracy on each task, %", loc="left")
        cells.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=cells, fraction=0.04, pad=0.02)
        bar.set_label("share of the own adapter's")
        bar.outline.set_visible(False)
        texts = sum(task["texts"] for task in summary["tasks"].values())
        figure.suptitle(
            f"{len(tasks)} LoRA adapters of all-MiniLM-L6-v2 merged into one model · {texts} test texts",
            x=0.01,
            ha="left",
            weight="bold",
        )
        figure.savefig(path, dpi=160, facecolor="white")
