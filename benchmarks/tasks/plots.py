"""The plots of the real-task page: accuracy against the number of tasks, the scale, and the directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tasks.experiments import KINDS
from benchmarks.tasks.groups import Group

# One colour per method on every plot, dark enough for a white page.
COLOURS = {
    "average": "#999999",
    "task_arithmetic": "#555555",
    "ties": "#8c564b",
    "wudi": "#ff7f0e",
    "wudi (exact)": "#ff7f0e",
    "tsv_m": "#1f77b4",
    "mda": "#17becf",
    "iso_c": "#2ca02c",
    "iso_cts": "#98b83b",
    "dc_merge": "#d62728",
    "whitened": "#9467bd",
}
TITLES = {kind: KINDS[kind] for kind in ("full", "lora")}


def write(groups: Mapping[tuple[str, str], Group], folder: Path) -> None:
    """Writes number.svg, scale.svg and directions.svg, as far as there are results for them."""
    import matplotlib as mpl

    mpl.use("Agg")
    style: dict[Any, Any] = {
        "svg.hashsalt": "dirmerge",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        for name, draw in (("number", _number), ("scale", _scale), ("directions", _directions)):
            figure = draw(groups)
            if figure is not None:
                figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure: Any, axes: Any) -> None:
    found: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        order = sorted(found, key=lambda label: list(COLOURS).index(label))
        figure.legend([found[k] for k in order], order, loc="outside right center")


def _number(groups: Mapping[tuple[str, str], Group]) -> Any:
    """Normalised test accuracy against the number of tasks, seed 0."""
    figure, axes = _figure(1, 2, 9, 3.6)
    drawn = False
    for axis, kind in zip(axes.flat, TITLES, strict=True):
        found = {len(g.merged): g for (s, k), g in groups.items() if k == kind and not g.unseen}
        axis.set(title=TITLES[kind], xlabel="tasks merged, T", ylabel="normalised accuracy, %")
        axis.set_xticks(sorted(found))
        for name, colour in COLOURS.items():
            points = [
                (t, 100 * found[t].estimate(name, seeds=[0]).value)
                for t in sorted(found)
                if 0 in found[t].seeds(name)
            ]
            if len(points) > 1:
                drawn = True
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour, label=name)
    _legend(figure, axes)
    return figure if drawn else None


def _scale(groups: Mapping[tuple[str, str], Group]) -> Any:
    """Normalised validation accuracy against λ and a(λD), seed 0 of eight tasks."""
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, axes = _figure(2, 2, 9, 6.2)
    drawn = False
    for row, kind in zip(axes, TITLES, strict=True):
        group = groups.get(("pypi", kind))
        for axis, key, label in zip(row, ("scale", "alignment"), ("λ", "a(λD)"), strict=True):
            axis.set(title=TITLES[kind], xlabel=label, ylabel="validation, %", xscale="log")
            axis.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 4]))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            for name, colour in COLOURS.items():
                if group is None or 0 not in group.seeds(name):
                    continue
                curve = group.runs[0]["rows"][name]["curve"]
                if curve:
                    drawn = True
                    x, y = [p[key] for p in curve], [100 * p["normalised"] for p in curve]
                    axis.plot(x, y, marker=".", color=colour, label=name)
    _legend(figure, axes)
    return figure if drawn else None


def _directions(groups: Mapping[tuple[str, str], Group]) -> Any:
    """Test accuracy against DirSim of the update, and against Δ_ETF of the class means of its features."""
    figure, axes = _figure(2, 2, 9, 6.2)
    drawn = False
    for row, kind in zip(axes, TITLES, strict=True):
        group = groups.get(("pypi", kind))
        row[0].set(xlabel="DirSim of D and the tasks")
        row[1].set(xlabel="Δ_ETF of the class means")
        for axis in row:
            axis.set(title=TITLES[kind], ylabel="normalised accuracy, %")
        for name, colour in COLOURS.items():
            for seed in group.seeds(name) if group is not None else []:
                assert group is not None
                rows = group.runs[seed]["rows"]
                accuracy = 100 * group.estimate(name, seeds=[seed]).value
                if "similarity" in rows[name]:
                    drawn = True
                    row[0].plot(rows[name]["similarity"], accuracy, "o", color=colour, label=name)
                gap = rows.get(f"{name} + rotation", {}).get("etf_gap")
                if gap is not None:
                    row[1].plot(gap["plain"], accuracy, "o", color=colour, label=name)
    _legend(figure, axes)
    return figure if drawn else None
