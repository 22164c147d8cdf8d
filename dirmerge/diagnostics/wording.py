"""How the figures and names of a report are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from dirmerge.diagnostics.result import Number


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


def whole(value: float) -> str:
    """Writes a number without decimals."""
    return f"{value:.0f}"


def short_number(value: float) -> str:
    """Writes a number with one decimal where it is below 10, without decimals else."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def cut(text: str, most: int) -> str:
    """Returns a text of at most so many characters, its middle left out."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[: most - 1 - half]}…{text[len(text) - half :]}"


def clean(text: str) -> str:
    """Returns a text that every parser takes: control characters and lone surrogates are replaced."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
