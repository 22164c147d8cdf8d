"""`dirmerge align`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dirmerge.cli.errors import report_errors
from dirmerge.cli.merge import print_summary
from dirmerge.cli.options import (
    Device,
    Log,
    LogKind,
    Memory,
    Out,
    Overwrite,
    RecipePath,
    Threads,
    resolve_compute,
)
from dirmerge.cli.progress import align_bar, json_align_progress, print_json
from dirmerge.cli.tables import make_table, open_console

if TYPE_CHECKING:
    from dirmerge.alignment.result import AlignResult


def align(
    recipe: RecipePath,
    out: Out,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Resume from this state file (.safetensors), written while learning."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = None,
    memory: Memory = None,
    log: Log = LogKind.text,
) -> None:
    """Merges, and aligns every task's features with unlabelled data: one backbone, a head per task."""
    with report_errors(log):
        from dirmerge.alignment.run import align as run_align

        resolve_compute(device, threads, memory)  # what makes no sense is told as a wrong command line
        where: dict[str, Any] = {"device": device, "threads": threads, "memory": memory}
        if log is LogKind.json:
            result = run_align(
                recipe,
                out,
                overwrite=overwrite,
                state=state,
                progress=json_align_progress,
                **where,
            )
            print_json({"event": "done", "path": str(result.path), **result.to_dict()})
            return
        with align_bar() as update:
            result = run_align(recipe, out, overwrite=overwrite, state=state, progress=update, **where)
        _print_alignment(result)


def _print_alignment(result: AlignResult) -> None:
    from dirmerge.engine.result import compute_text

    console = open_console()
    print_summary(result.merge)
    if result.fits is not None:
        rows = [
            [fit.name, str(fit.inputs)]
            + [f"{100 * f.agreement:.1f}" if f else "" for f in (fit.plain, fit.aligned, fit.control)]
            for fit in result.fits
        ]
        title = "Agreement with each task's own fine-tune, % of the inputs held out"
        console.print(
            make_table(title, ["task", "inputs", "merged", "aligned", "base aligned (control)"], rows)
        )
    console.print(f"models   ran on {compute_text(result.compute)}", markup=False, highlight=False)
    if result.learned is not None:
        learned = result.learned
        console.print(f"learned  {learned.steps} steps, kept the state of step {learned.best_step}")
    for note in result.notes:
        console.print(f"note     {note}", markup=False, highlight=False)
    console.print(f"heads    {', '.join(result.heads)}", markup=False, highlight=False)
