"""`dirmerge demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dirmerge.cli.errors import report_errors
from dirmerge.cli.options import LogKind


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for results, picture and merged model.")] = Path(
        "demo-out"
    ),
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; repeat for more.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Only this method; repeat for more.")
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", min=1, help="Largest number of test texts of each task.")
    ] = 400,
) -> None:
    """Merges eight real adapters of a real transformer by every method and evaluates the results."""
    with report_errors(LogKind.text):
        try:
            from dirmerge.demo import run

            run.main(out, tasks=task, methods=method, texts=texts)
        except ModuleNotFoundError as error:
            from dirmerge.doctor import DEMO

            if (error.name or "").split(".")[0] not in DEMO:
                raise
            typer.echo(f"the demo needs {error.name}: pip install 'dirmerge[demo]'", err=True)
            raise typer.Exit(1) from error
