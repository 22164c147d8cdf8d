"""`dirmerge merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dirmerge.cli.errors import report_errors
from dirmerge.cli.options import (
    AsKind,
    Device,
    Log,
    LogKind,
    Memory,
    Out,
    OutputKind,
    Overwrite,
    Rank,
    RecipePath,
    Threads,
    resolve_compute,
)
from dirmerge.cli.progress import json_progress, print_json, progress_bar
from dirmerge.cli.tables import bytes_text, make_table, open_console
from dirmerge.errors import OutputError

if TYPE_CHECKING:
    from dirmerge.engine.result import MergeResult


def merge(
    recipe: RecipePath,
    out: Out,
    kind: AsKind = OutputKind.model,
    rank: Rank = None,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", help="Largest weight file, such as 5GB; default: the recipe's."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = None,
    memory: Memory = None,
    log: Log = LogKind.text,
) -> None:
    """Merges the models of a recipe into one folder."""
    with report_errors(log):
        from dirmerge import api
        from dirmerge.engine import pipeline
        from dirmerge.recipe import load_recipe, parse_size

        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise OutputError(f"{out}: exists and is not empty; choose another folder or pass --overwrite")
        loaded = load_recipe(recipe)
        if shard_size is not None:
            try:
                loaded = loaded.with_shard_size(parse_size(shard_size))
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--shard-size") from error
        compute = resolve_compute(device, threads, memory)
        planned = api.plan(loaded, as_adapter=kind is OutputKind.adapter, rank=rank)
        if log is LogKind.json:
            print_json(
                {"event": "plan", "method": planned.method_name, **planned.totals(), "notes": planned.notes}
            )
            result = pipeline.run(planned, out, overwrite=overwrite, progress=json_progress, compute=compute)
            print_json({"event": "done", **result.to_dict()})
            return
        for note in planned.notes:
            typer.echo(f"note: {note}", err=True)
        with progress_bar() as update:
            result = pipeline.run(planned, out, overwrite=overwrite, progress=update, compute=compute)
        print_summary(result)


def print_summary(result: MergeResult) -> None:
    """Prints what a merge did, as a table."""
    from dirmerge.engine.result import compute_text

    console = open_console()
    rules = ", ".join(f"{count} {rule}" for rule, count in sorted(result.rules.items()))
    rows = [
        ["method", result.method],
        ["scale", result.scale_text()],
        ["tensors", rules],
        ["ran on", compute_text(result.compute)],
        ["time", f"{result.seconds:.1f} s"],
        ["peak memory", bytes_text(result.peak_rss)],
    ]
    lowest = result.lowest_energy()
    if lowest is not None:
        rows.append(["lowest energy kept", f"{lowest[1]:.3f} ({lowest[0]})"])
    for name, fallbacks in list(result.fallbacks.items())[:5]:
        rows.append([f"fallback in {name}", "; ".join(fallbacks)])
    if len(result.fallbacks) > 5:
        rows.append(["more fallbacks", f"in {len(result.fallbacks) - 5} tensors, see dirmerge.json"])
    rows += [["note", note] for note in result.frequent_notes()]
    rows.append(["output", str(result.path)])
    console.print(make_table("Merged", ["", ""], rows))
