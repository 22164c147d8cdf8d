"""The page of an inspection: one self-contained HTML file with inline SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dirmerge.diagnostics.charts import (
    BLUE,
    BROWN,
    PAPER,
    Drawing,
    Panel,
    accumulation_chart,
    colour,
    energy_chart,
    heat_map,
    ink_on,
)
from dirmerge.diagnostics.result import Inspection, ModelSummary, Number, ParameterInspection, summarise
from dirmerge.diagnostics.wording import (
    clean,
    cut,
    fixed,
    number,
    share,
    short_names,
    short_number,
    short_parameters,
    whole,
)
from dirmerge.engine.result import compute_text

# Above so many matrices the maps show layers, means over their matrices; the table has every matrix.
ROWS_OF_MATRICES = 72


def to_html(inspection: Inspection) -> str:
    """Returns the report: HTML that needs no network, no script and no other file.

    Raises:
        ModuleNotFoundError: jinja2 is missing, which the extra `report` brings.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dirmerge.diagnostics", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "fixed": fixed, "share": share}
    page: str = environment.get_template("report.html.j2").render(**_content(inspection))
    return page


def by_layer(parameters: Sequence[ParameterInspection]) -> list[tuple[str, list[ParameterInspection]]]:
    """Returns the matrices by layer, in order; a matrix outside the layers forms a group of one."""
    groups: dict[str, list[ParameterInspection]] = {}
    for parameter in parameters:
        match = re.match(r"(.*?[A-Za-z_]\w*\.\d+)\.", parameter.name)
        groups.setdefault(match[1] if match else parameter.name, []).append(parameter)
    return list(groups.items())


def _content(found: Inspection) -> dict[str, Any]:
    """Returns the values of the template."""
    names = [cut(clean(name), 40) for name in short_names(found.tasks)]
    summary = found.summary
    return {
        "found": found.model_copy(
            update={
                "source": clean(found.source),
                "base": None if found.base is None else clean(found.base),
                "scale": clean(found.scale),
                "notes": [clean(note) for note in found.notes],
                "class_gaps": {clean(name): gap for name, gap in found.class_gaps.items()},
                "options": {clean(str(key)): clean(str(value)) for key, value in found.options.items()},
            }
        ),
        "names": names,
        "ran_on": clean(compute_text(found.compute)),
        "labels": [clean(label) for label in found.tasks],
        "tiles": key_figures(summary),
        "energy": energy_chart(names, [task.energy_curve for task in summary.tasks]),
        "sums": accumulation_chart(
            _mean_ratios(p.accumulation for p in found.parameters),
            _mean_ratios(p.accumulation_merged for p in found.parameters),
        ),
        "pairs": _pair_maps(names, summary),
        **_layer_maps(found, names),
        "table": _table(found.parameters),
    }


def key_figures(summary: ModelSummary) -> list[tuple[str, str, str]]:
    """Returns name, figure and context of the key figures."""
    before = _mean([task.similarity_before for task in summary.tasks])
    after = _mean([task.similarity_after for task in summary.tasks])
    gain = None if summary.accumulation is None else f"largest {number(summary.accumulation_largest)} ×"
    return [
        (
            "Output spaces overlap",
            share(summary.left_overlap),
            f"{_times_chance(summary.left_overlap, summary.left_chance)} ({share(summary.left_chance)})",
        ),
        (
            "Input spaces overlap",
            share(summary.right_overlap),
            f"{_times_chance(summary.right_overlap, summary.right_chance)} ({share(summary.right_chance)})",
        ),
        (
            "Singular task interference",
            number(summary.interference),
            f"over Σ s; {_times_chance(summary.interference, summary.interference_chance)}",
        ),
        ("Directional similarity", f"{number(before, 2)} → {number(after, 2)}", "plain sum → merged update"),
        ("Alignment a(λD)", number(summary.alignment, 2), "of the tasks' leading components reproduced"),
        (
            "Magnitude against the sum's sign",
            share(summary.opposed),
            f"{share(summary.sign_conflict)} of entries conflict, {share(summary.sign_chance)} by chance",
        ),
        ("Over-accumulation of σ₁", f"{number(summary.accumulation)} ×", gain or ""),
        (
            "Outside the ETF subspace",
            share(summary.outside_etf),
            f"merged update; {share(summary.outside_etf_shared)} of the shared component",
        ),
    ]


def _times_chance(value: Number, chance: Number) -> str:
    return "no chance level" if value is None or not chance else f"{value / chance:.2g} × chance"


def _pair_maps(names: Sequence[str], summary: ModelSummary) -> Drawing:
    """Draws the four tables of pairs of tasks; a task with itself is left empty."""

    def without_diagonal(table: Sequence[Sequence[Number]]) -> list[list[Number]]:
        return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(table)]

    tables = {
        (side, key): without_diagonal(getattr(pairs, key))
        for side, pairs in (("left", summary.left), ("right", summary.right))
        for key in ("overlap", "mean_angle")
    }
    overlaps, angles = (
        [
            v
            for (_, name), table in tables.items()
            if name == key
            for row in table
            for v in row
            if v is not None
        ]
        for key in ("overlap", "mean_angle")
    )
    chance = [value for value in (summary.left_chance, summary.right_chance) if value is not None]
    low, high = min([*overlaps, *chance], default=0.0), max(overlaps, default=1.0)
    least, largest = min(angles, default=0.0), max(angles, default=90.0)
    return heat_map(
        "overlap and principal angles of the tasks' subspaces",
        names,
        names,
        [
            Panel("Overlap of outputs, %", tables["left", "overlap"], BROWN, low=low, high=high),
            Panel("Overlap of inputs, %", tables["right", "overlap"], BROWN, low=low, high=high),
            Panel(
                "Mean angle of outputs, °", tables["left", "mean_angle"], BROWN[::-1], whole, least, largest
            ),
            Panel(
                "Mean angle of inputs, °", tables["right", "mean_angle"], BROWN[::-1], whole, least, largest
            ),
        ],
    )


def _layer_maps(found: Inspection, names: Sequence[str]) -> dict[str, Any]:
    """Draws the maps by layer and task, or by matrix and task where the matrices are few."""
    count = len(names)
    is_by_matrix = len(found.parameters) <= ROWS_OF_MATRICES
    groups = [(p.name, [p]) for p in found.parameters] if is_by_matrix else by_layer(found.parameters)
    rows = [clean(name) for name in short_parameters([name for name, _ in groups])]
    summaries = [summarise(members, count) for _, members in groups]

    def values(key: str) -> list[list[Number]]:
        return [[getattr(task, key) for task in summary.tasks] for summary in summaries]

    similar = [v for key in ("similarity_before", "similarity_after") for row in values(key) for v in row]
    low = min((v for v in similar if v is not None), default=0.0)
    directions = heat_map(
        "what the merged update keeps, by layer and task",
        rows,
        names,
        [
            Panel("DirSim of the plain sum, %", values("similarity_before"), low=low, high=1.0),
            Panel("DirSim of the merged update, %", values("similarity_after"), low=low, high=1.0),
            Panel("Alignment a(λD), %", values("alignment")),
        ],
    )
    tasks = heat_map(
        "what the tasks are like, by layer and task",
        rows,
        names,
        [
            Panel("Against the sum's sign, %", values("opposed"), BROWN),
            Panel("Singular values for 90 %", values("directions_90"), BLUE, whole),
            Panel("Stable rank", values("stable_rank"), BLUE, short_number),
        ],
    )
    return {"directions": directions, "tasks": tasks, "by": "matrix" if is_by_matrix else "layer"}


# Heading, colours and writing of the table's columns; each is coloured on its own scale.
_COLUMNS: tuple[tuple[str, Sequence[str] | None, Callable[[float], str]], ...] = (
    ("λ", None, lambda value: f"{value:.3g}"),
    ("alignment", BLUE, lambda value: f"{value:.2f}"),
    ("DirSim sum", BLUE, lambda value: f"{value:.2f}"),
    ("DirSim merged", BLUE, lambda value: f"{value:.2f}"),
    ("overlap out, × chance", BROWN, lambda value: f"{value:.2f}"),
    ("overlap in, × chance", BROWN, lambda value: f"{value:.2f}"),
    ("interference, × chance", BROWN, lambda value: f"{value:.2f}"),
    ("against sign, %", BROWN, lambda value: f"{100 * value:.1f}"),
    ("σ₁ of sum, ×", BROWN, lambda value: f"{value:.2f}"),
    ("σ₁ of merged, ×", BROWN, lambda value: f"{value:.2f}"),
    ("stable rank merged", BLUE, lambda value: f"{value:.1f}"),
    ("outside ETF, %", BROWN, lambda value: f"{100 * value:.1f}"),
)


def _table(parameters: Sequence[ParameterInspection]) -> dict[str, Any]:
    """Returns headings and rows of cells (text, fill, ink) of the table of matrices."""
    figures = [_figures(parameter) for parameter in parameters]
    scales = []
    for column in zip(*figures, strict=True):
        known = [value for value in column if value is not None]
        scales.append((min(known, default=0.0), max(known, default=1.0)))
    rows = []
    names = short_parameters([parameter.name for parameter in parameters])
    for name, parameter, values in zip(names, parameters, figures, strict=True):
        cells = []
        for value, (_, ramp, show), (low, high) in zip(values, _COLUMNS, scales, strict=True):
            fill = PAPER
            if ramp is not None and value is not None and high - low > 0.005 * max(abs(low), abs(high)):
                # The darkest colours are left to the maps: a table is for reading.
                fill = colour(0.6 * (value - low) / (high - low), ramp)
            cells.append(("–" if value is None else show(value), fill, ink_on(fill)))
        shape = " × ".join(str(size) for size in parameter.shape)
        title = " · ".join([parameter.name, *parameter.notes])
        rows.append((clean(name), clean(title), shape, cells, bool(parameter.notes)))
    return {"heads": [name for name, _, _ in _COLUMNS], "rows": rows}


def _figures(p: ParameterInspection) -> list[Number]:
    if not p.is_changed:
        return [p.scale] + [None] * (len(_COLUMNS) - 1)
    tasks = [task for task in p.tasks if task is not None]
    return [
        p.scale,
        p.alignment,
        _mean([task.similarity_before for task in tasks]),
        _mean([task.similarity_after for task in tasks]),
        _ratio(p.left.mean_off_diagonal("overlap"), p.left.mean_off_diagonal("chance")),
        _ratio(p.right.mean_off_diagonal("overlap"), p.right.mean_off_diagonal("chance")),
        _ratio(p.interference, p.interference_chance),
        p.opposed,
        p.accumulation[0] if p.accumulation else None,
        p.accumulation_merged[0] if p.accumulation_merged else None,
        p.merged_stable_rank,
        p.outside_etf,
    ]


def _mean_ratios(lists: Iterable[Sequence[float]]) -> list[float]:
    known = [values for values in lists if values]
    longest = max((len(values) for values in known), default=0)
    columns = [[values[i] for values in known if len(values) > i] for i in range(longest)]
    return [sum(column) / len(column) for column in columns]


def _ratio(value: Number, chance: Number) -> Number:
    return None if value is None or not chance else value / chance


def _mean(values: Sequence[Number]) -> Number:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
