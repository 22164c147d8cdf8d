"""Progress: a bar on a terminal, lines in a log, JSON objects for a program."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from dirmerge.cli.tables import bytes_text

if TYPE_CHECKING:
    from dirmerge.alignment.result import AlignProgress
    from dirmerge.engine.result import Progress


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Shows progress on standard error: a bar on a terminal, lines in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        TextColumn("{task.fields[bytes]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(time.monotonic)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merge", total=1.0, tensors="0", bytes="")

        def update(step: Any) -> None:
            bar.update(
                task,
                description=step.phase,
                completed=step.work,
                tensors=f"{step.done}/{step.total}",
                bytes=_written(step),
            )

        yield update


def _written(step: Progress) -> str:
    if not step.output_bytes:
        return ""
    return f"{bytes_text(step.written_bytes)}/{bytes_text(step.output_bytes)}"


class ProgressLines:
    """Prints a line on standard error every LINE_SECONDS, so that an hour's merge is not silent in a log.

    Args:
        clock: seconds.
    """

    LINE_SECONDS = 10.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = self._last = clock()

    def __call__(self, step: Progress) -> None:
        """Prints the line if it is due."""
        now = self._clock()
        if now - self._last < self.LINE_SECONDS:
            return
        self._last = now
        seconds = now - self._started
        parts = [f"{step.phase}: {step.done}/{step.total} tensors", f"{100 * step.work:.0f} %"]
        if step.output_bytes:
            parts.append(f"{_written(step)} written")
        parts.append(f"{seconds:.0f} s")
        if step.work > 0:
            parts.append(f"about {seconds * (1 - step.work) / step.work:.0f} s left")
        typer.echo(", ".join(parts), err=True)


@contextlib.contextmanager
def align_bar() -> Iterator[Callable[[AlignProgress], None]]:
    """Shows a progress bar on standard error that names the phase."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("merge", total=1.0, what="")

        def update(step: AlignProgress) -> None:
            what = f"{step.done}/{step.total} {step.name}"
            bar.update(task, description=step.phase, completed=step.done, total=step.total, what=what)

        yield update


def print_json(event: dict[str, Any]) -> None:
    """Prints an object as one line on standard output."""
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def json_progress(step: Progress) -> None:
    """Prints a step of a merge as JSON."""
    print_json(
        {
            "event": "tensor",
            "phase": step.phase,
            "name": step.name,
            "done": step.done,
            "total": step.total,
            "written_bytes": step.written_bytes,
            "output_bytes": step.output_bytes,
        }
    )


def json_align_progress(step: AlignProgress) -> None:
    """Prints a step of an alignment as JSON."""
    print_json(
        {"event": "align", "phase": step.phase, "name": step.name, "done": step.done, "total": step.total}
    )
