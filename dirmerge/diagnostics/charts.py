"""The charts of a report: drawings as plain data, made by small pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dirmerge.diagnostics.result import Number
from dirmerge.diagnostics.wording import cut

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
        title: heading of the table.
        values: values by row and column.
        ramp: colours from low to high.
        show: function that formats the value of a cell.
        low: value of the lightest colour; default: the smallest value.
        high: value of the darkest colour; default: the largest value.
    """

    title: str
    values: Sequence[Sequence[Number]]
    ramp: Sequence[str] = BLUE
    show: Callable[[float], str] = lambda value: f"{100 * value:.0f}"
    low: float | None = None
    high: float | None = None


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
    margin = 14 + 6.0 * max((len(cut(name, 40)) for name in rows), default=0)
    top = 46 + 5.4 * max((len(cut(name, 16)) for name in columns), default=0) * 0.75
    drawing = Drawing(label, height=top + height * len(rows) + 44)
    for r, name in enumerate(rows):
        drawing.texts.append(
            Text(margin - 6, top + height * (r + 0.5) + 3.5, cut(name, 40), 10.5, anchor="end")
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
            drawing.texts.append(Text(x, top - 6, cut(name, 16), 10, turn=-50))
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
        drawing.texts.append(Text(right + 52, y, cut(name, 18)))
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
