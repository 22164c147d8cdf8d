"""Tables, and sizes in bytes, for a terminal or a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def open_console() -> Console:
    """Returns the console of standard output."""
    from rich.console import Console

    # A terminal's width, but enough for a table when the output goes to a file.
    return Console() if sys.stdout.isatty() else Console(width=200)


def make_table(title: str | None, columns: list[str], rows: list[list[str]]) -> Table:
    """Returns a table of plain text; only the first and the last column wrap."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=0 < i < len(columns) - 1)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def bytes_text(count: float) -> str:
    """Returns a number of bytes in the unit that suits it, such as 1.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
