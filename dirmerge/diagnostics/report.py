"""The page of an inspection: one self-contained HTML file with inline SVG, drawn by small pure functions."""

from __future__ import annotations

import importlib
import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from dirmerge.checkpoints.safetensors_io import read_json_object
from dirmerge.diagnostics.result import Inspection, ModelSummary, Number, ParameterInspection, summarise
from dirmerge.errors import CheckpointError, OutputError

# What a page of ours holds in its head: only such a file is replaced.
GENERATOR = b'<meta name="generator" content="dirmerge inspect" />'

# Above so many matrices the maps show layers, means over their matrices; the table has every matrix.
ROWS_OF_MATRICES = 72

# Ramps of one hue from light to dark: their order survives grey print and every colour vision.
BLUE = ("#f3f8fc", "#d3e4f2", "#a6cbe3", "#6ba8d0", "#3380b9", "#125596", "#08306b")
BROWN = ("#fff8ee", "#fde3c2", "#fbc38a", "#f2975a", "#d66a2c", "#a84312", "#6b2504")
# Okabe and Ito's palette without its yellow, which white paper swallows; dashes tell the rest apart.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
DASHES = ("", "6 3", "2 2", "8 3 2 3")
INK, PAPER, FAINT = "#1a202c", "#ffffff", "#5f6b7c"


@dataclass(frozen=True)
class Rect:
    """A filled rectangle with a tooltip."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text; `turn` in degrees about its anchor."""

    x: float
    y: float
    text: str
    size: float = 11
    anchor: str = "start"
    fill: str = INK
    turn: float = 0
    weight: str = "normal"


@dataclass(frozen=True)
class Line:
    """A path with a tooltip."""

    path: str
    stroke: str
    width: float = 1.0
    dash: str = ""
    title: str = ""


@dataclass
class Drawing:
    """What one SVG holds."""

    label: str
    width: float = 0
    height: float = 0
    rects: list[Rect] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One table of a heat map.

    Attributes:
        title: above it.
        values: per row, per column.
        ramp: colours from low to high.
        show: writes a value in a cell.
        low: value of the lightest colour, high: of the darkest; default the least and the largest.
    """

    title: str
    values: Sequence[Sequence[Number]]
    ramp: Sequence[str] = BLUE
    show: Callable[[float], str] = lambda value: f"{100 * value:.0f}"
    low: float | None = None
    high: float | None = None


def check(html: Path | None, json_path: Path | None, *, overwrite: bool) -> None:
    """Checks, before the work, that a report can be written.

    Args:
        html: the page to write, None for none.
        json_path: the JSON file to write, None for none.
        overwrite: whether files that exist may be replaced; only those that an inspection wrote may.

    Raises:
        OutputError: a file exists and may not be replaced, is a folder, or its folder does not exist; both
            are one file.
        ModuleNotFoundError: jinja2 is missing, which the extra `report` brings.
    """
    paths = [path for path in (html, json_path) if path is not None]
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists; choose another file or pass --overwrite")
        if path.exists() and not _is_report(path):
            raise OutputError(f"{path}: was not written by `dirmerge inspect`, and is not replaced")
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path}: its folder does not exist")
    if len(paths) == 2 and paths[0].absolute() == paths[1].absolute():
        raise OutputError(f"{html}: is given for both the page and the JSON")
    if html is not None:
        importlib.import_module("jinja2")


def write(inspection: Inspection, html: Path | None = None, json_path: Path | None = None) -> None:
    """Writes the page and the figures; each file appears complete or not at all.

    Raises:
        OutputError: a file cannot be written.
    """
    if html is not None:
        _write(html, to_html(inspection))
    if json_path is not None:
        _write(json_path, json.dumps(inspection.to_dict(), indent=1) + "\n")


def _is_report(path: Path) -> bool:
    """Whether an inspection wrote the file: a page names its generator, JSON has all keys."""
    try:
        with path.open("rb") as file:
            if GENERATOR in file.read(1000):
                return True
        figures = read_json_object(path, limit=1 << 30)
    except (OSError, CheckpointError):
        return False
    return Inspection.model_fields.keys() <= figures.keys()


def _write(path: Path, text: str) -> None:
    # A link is followed, so that it stays one and its target is replaced.
    target = path.resolve()
    part = target.with_name(f".{target.name}.dirmerge-{secrets.token_hex(4)}")
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


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


def number(value: Number, digits: int = 3) -> str:
    """Writes a number with so many significant digits, – where there is none."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def fixed(value: Number, decimals: int = 2) -> str:
    """Writes a number with so many decimals, – where there is none."""
    return "–" if value is None else f"{value:.{decimals}f}"


def share(value: Number) -> str:
    """Writes a share as a percentage, – where there is none."""
    return "–" if value is None else f"{100 * value:.{1 if value < 0.1 else 0}f} %"


def short_names(labels: Sequence[str]) -> list[str]:
    """Returns the last parts of paths, with as many parts before as tell them apart."""
    parts = [PurePath(label).parts or (label,) for label in labels]
    longest = max((len(p) for p in parts), default=1)
    for count in range(1, longest + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{label} ({i})" for i, label in enumerate(labels, 1)]


def short_parameters(names: Sequence[str]) -> list[str]:
    """Returns tensor names without the parts all of them begin or end with."""
    parts = [name.split(".") for name in names]
    least = min((len(p) for p in parts), default=1)
    before = after = 0
    while before < least - 1 and len({p[before] for p in parts}) == 1:
        before += 1
    while after < least - before - 1 and len({p[-1 - after] for p in parts}) == 1:
        after += 1
    return [".".join(p[before : len(p) - after]) for p in parts]


def by_layer(parameters: Sequence[ParameterInspection]) -> list[tuple[str, list[ParameterInspection]]]:
    """Returns the matrices by layer, in order; one outside the layers stands alone."""
    groups: dict[str, list[ParameterInspection]] = {}
    for parameter in parameters:
        match = re.match(r"(.*?[A-Za-z_]\w*\.\d+)\.", parameter.name)
        groups.setdefault(match[1] if match else parameter.name, []).append(parameter)
    return list(groups.items())


def colour(position: float, ramp: Sequence[str]) -> str:
    """Returns the colour at a position in [0, 1] of a ramp, linear between its stops."""
    place = min(max(position, 0.0), 1.0) * (len(ramp) - 1)
    i = min(int(place), len(ramp) - 2)
    pairs = zip(_rgb(ramp[i]), _rgb(ramp[i + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - i)):02x}" for a, b in pairs)


def ink_on(fill: str) -> str:
    """Returns white or black, whichever has the higher contrast on a colour: at least 4.5 (WCAG AA)."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in _rgb(fill))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return PAPER if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def heat_map(label: str, rows: Sequence[str], columns: Sequence[str], panels: Sequence[Panel]) -> Drawing:
    """Draws tables of the same rows side by side: names once, one legend per table, values in wide cells.

    Args:
        label: what it shows, for readers that do not see it.
        rows: names.
        columns: names, of every panel.
        panels: the tables.
    """
    width = min(46.0, max(11.0, 210 / max(1, len(columns))))
    height = 15.0 if len(rows) > 16 else 20.0
    margin = 14 + 6.0 * max((len(_cut(name, 40)) for name in rows), default=0)
    top = 46 + 5.4 * max((len(_cut(name, 16)) for name in columns), default=0) * 0.75
    drawing = Drawing(label, height=top + height * len(rows) + 44)
    for r, name in enumerate(rows):
        drawing.texts.append(
            Text(margin - 6, top + height * (r + 0.5) + 3.5, _cut(name, 40), 10.5, anchor="end")
        )
    left = margin
    for panel in panels:
        values = [value for row in panel.values for value in row if value is not None]
        low = panel.low if panel.low is not None else min(values, default=0.0)
        high = panel.high if panel.high is not None else max(values, default=1.0)
        span = high - low or 1.0
        drawing.texts.append(Text(left, 14, panel.title, 12, weight="600"))
        for c, name in enumerate(columns):
            x = left + width * (c + 0.5)
            drawing.texts.append(Text(x, top - 6, _cut(name, 16), 10, turn=-50))
        for r, row in enumerate(panel.values):
            for c, value in enumerate(row):
                x, y = left + width * c, top + height * r
                shown = "–" if value is None else panel.show(value)
                title = f"{rows[r]} · {columns[c]}: {shown}"
                fill = "#edf0f3" if value is None else colour((value - low) / span, panel.ramp)
                drawing.rects.append(Rect(x, y, width - 1, height - 1, fill, title))
                if width >= 6.2 * len(shown) + 3:
                    ink = FAINT if value is None else ink_on(fill)
                    drawing.texts.append(
                        Text(x + (width - 1) / 2, y + height / 2 + 3, shown, 9, "middle", ink)
                    )
        _legend(drawing, left, top + height * len(rows) + 10, panel, low, high)
        left += max(width * len(columns), 7.0 * len(panel.title)) + 26
    drawing.width = left - 10
    return drawing


def _legend(drawing: Drawing, x: float, y: float, panel: Panel, low: float, high: float) -> None:
    steps = 20
    for i in range(steps):
        drawing.rects.append(Rect(x + 5 * i, y, 5.2, 9, colour(i / (steps - 1), panel.ramp)))
    drawing.texts.append(Text(x, y + 21, panel.show(low), 9, fill=FAINT))
    drawing.texts.append(Text(x + 5 * steps, y + 21, panel.show(high), 9, "end", FAINT))


def energy_chart(names: Sequence[str], curves: Sequence[Sequence[float]]) -> Drawing:
    """Draws the share of the energy that the leading 1, 2, 4, … singular values hold, a line per task."""
    drawing = Drawing("share of the energy by number of singular values", 560, 288)
    left, right, top, bottom = 44.0, 390.0, 16.0, 250.0
    longest = max((len(curve) for curve in curves), default=0)
    steps = max(1, longest - 1)

    def place(i: int, value: float) -> tuple[float, float]:
        return left + (right - left) * i / steps, bottom - (bottom - top) * value

    for value in (0, 0.25, 0.5, 0.75, 0.9, 1):
        y = place(0, value)[1]
        stroke, dash = ("#4a5568", "4 3") if value == 0.9 else ("#dfe4ea", "")
        drawing.lines.append(Line(f"M{left} {y:.1f}H{right}", stroke, 1, dash))
        drawing.texts.append(Text(left - 6, y + 3.5, f"{100 * value:.0f} %", 10, "end", FAINT))
    for i in range(longest):
        drawing.texts.append(Text(place(i, 0)[0], bottom + 15, str(1 << i), 10, "middle", FAINT))
    drawing.texts.append(
        Text((left + right) / 2, bottom + 34, "leading singular values", 11, "middle", FAINT)
    )
    for t, (name, curve) in enumerate(zip(names, curves, strict=True)):
        stroke, dash = LINES[t % len(LINES)], DASHES[t // len(LINES) % len(DASHES)]
        points = [place(i, value) for i, value in enumerate(curve)]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
        title = f"{name}: " + ", ".join(f"{1 << i}: {100 * value:.0f} %" for i, value in enumerate(curve))
        if path:
            drawing.lines.append(Line(path, stroke, 1.8, dash, title))
        y = top + 8 + 17 * t
        drawing.lines.append(Line(f"M{right + 20} {y - 4}h26", stroke, 2.4, dash))
        drawing.texts.append(Text(right + 52, y, _cut(name, 18)))
        drawing.height = max(drawing.height, y + 20)
    return drawing


def accumulation_chart(before: Sequence[float], after: Sequence[float]) -> Drawing:
    """Draws leading singular values of the sum and of the merged update over those of orthogonal tasks."""
    drawing = Drawing("leading singular values over those of orthogonal tasks", 430, 276)
    left, right, top, bottom = 40.0, 420.0, 34.0, 250.0
    high = max([1.2, *before, *after]) * 1.08
    step = 0.5 if high < 4 else math.ceil(high / 6)
    value = 0.0
    while value <= high:
        y = bottom - (bottom - top) * value / high
        is_one = value == 1
        drawing.lines.append(
            Line(f"M{left} {y:.1f}H{right}", "#4a5568" if is_one else "#dfe4ea", 1, "4 3" if is_one else "")
        )
        drawing.texts.append(Text(left - 6, y + 3.5, f"{value:g}", 10, "end", FAINT))
        value += step
    count = max(len(before), len(after), 1)
    pitch = (right - left) / count
    series = (("plain sum", before, BROWN[4]), ("merged", after, BLUE[5]))
    for k, (name, values, fill) in enumerate(series):
        for i, ratio in enumerate(values):
            size = (bottom - top) * ratio / high
            x = left + pitch * (i + 0.14 + 0.37 * k)
            drawing.rects.append(
                Rect(x, bottom - size, pitch * 0.34, size, fill, f"{name}, σ{i + 1}: {ratio:.3g} ×")
            )
        drawing.rects.append(Rect(left + 110 * k, 6, 12, 12, fill))
        drawing.texts.append(Text(left + 110 * k + 18, 16, name))
    for i in range(count):
        drawing.texts.append(Text(left + pitch * (i + 0.5), bottom + 15, f"σ{i + 1}", 10, "middle", FAINT))
    return drawing


def _content(found: Inspection) -> dict[str, Any]:
    """Returns what the template shows."""
    names = [_cut(_clean(name), 40) for name in short_names(found.tasks)]
    summary = found.summary
    return {
        "found": found.model_copy(
            update={
                "source": _clean(found.source),
                "base": None if found.base is None else _clean(found.base),
                "scale": _clean(found.scale),
                "notes": [_clean(note) for note in found.notes],
                "class_gaps": {_clean(name): gap for name, gap in found.class_gaps.items()},
                "options": {_clean(str(key)): _clean(str(value)) for key, value in found.options.items()},
            }
        ),
        "names": names,
        "labels": [_clean(label) for label in found.tasks],
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
                "Mean angle of outputs, °", tables["left", "mean_angle"], BROWN[::-1], _count, least, largest
            ),
            Panel(
                "Mean angle of inputs, °", tables["right", "mean_angle"], BROWN[::-1], _count, least, largest
            ),
        ],
    )


def _layer_maps(found: Inspection, names: Sequence[str]) -> dict[str, Any]:
    """Draws the maps by layer and task, or by matrix and task where the matrices are few."""
    count = len(names)
    is_by_matrix = len(found.parameters) <= ROWS_OF_MATRICES
    groups = [(p.name, [p]) for p in found.parameters] if is_by_matrix else by_layer(found.parameters)
    rows = [_clean(name) for name in short_parameters([name for name, _ in groups])]
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
            Panel("Singular values for 90 %", values("directions_90"), BLUE, _count),
            Panel("Stable rank", values("stable_rank"), BLUE, _short),
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
        rows.append((_clean(name), _clean(title), shape, cells, bool(parameter.notes)))
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


def _count(value: float) -> str:
    return f"{value:.0f}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _cut(text: str, most: int) -> str:
    """Returns a text of at most so many characters, its middle left out."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[: most - 1 - half]}…{text[len(text) - half :]}"


def _clean(text: str) -> str:
    """Returns a text that every parser takes: control characters and lone surrogates are replaced."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
