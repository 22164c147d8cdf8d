"""`dirmerge inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dirmerge.cli.errors import report_errors
from dirmerge.cli.options import Device, LogKind, Memory, Threads, resolve_compute
from dirmerge.cli.progress import progress_bar
from dirmerge.cli.tables import make_table, open_console

if TYPE_CHECKING:
    from dirmerge.diagnostics import Inspection


def inspect(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE|DIR", help="A recipe, or a folder that `merge` has written.")
    ],
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the report: one self-contained page.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that an inspection wrote.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    memory: Memory = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no summary.")] = False,
) -> None:
    """Measures a merge by its directions: task spaces, their conflicts, what the merged update keeps."""
    with report_errors(LogKind.text):
        from dirmerge.diagnostics import inspect as run_inspect
        from dirmerge.diagnostics import report

        try:
            # A report that cannot be written is an error before the work.
            report.check(html, as_json, overwrite=overwrite)
        except ModuleNotFoundError as error:
            typer.echo(f"the report needs {error.name}: pip install 'dirmerge[report]'", err=True)
            raise typer.Exit(1) from error
        resolve_compute(device, threads, memory)  # what makes no sense is told as a wrong command line
        where: dict[str, Any] = {"device": device, "threads": threads, "memory": memory}
        if quiet:
            found = run_inspect(source, **where)
        else:
            with progress_bar() as update:
                found = run_inspect(source, progress=update, **where)
        report.write(found, html, as_json)
        if not quiet:
            _print_inspection(found, [path for path in (html, as_json) if path is not None])


def _print_inspection(found: Inspection, written: list[Path]) -> None:
    from dirmerge.diagnostics.page import key_figures
    from dirmerge.diagnostics.wording import fixed, number, share, short_names
    from dirmerge.engine.result import compute_text

    console = open_console()
    rows = [
        [
            name,
            number(task.norm),
            fixed(task.directions_90, 1),
            fixed(task.stable_rank, 1),
            fixed(task.alignment),
            f"{fixed(task.similarity_before)} → {fixed(task.similarity_after)}",
            share(task.opposed),
        ]
        for name, task in zip(short_names(found.tasks), found.summary.tasks, strict=True)
    ]
    columns = ["task", "‖D‖", "σ for 90 %", "stable rank", "alignment", "DirSim sum → merged", "against sign"]
    console.print(make_table(f"{found.method}, {len(found.parameters)} matrices", columns, rows))
    figures = [
        ["ran on", compute_text(found.compute), ""],
        ["scale", found.scale, ""],
        *([*figure] for figure in key_figures(found.summary)),
    ]
    console.print(make_table("Model", ["", "", ""], figures))
    for path in written:
        console.print(f"written {path}", markup=False, highlight=False)
