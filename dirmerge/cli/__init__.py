"""The command line: parses, calls, prints.

Exit codes are those of dirmerge.errors; 2 means a wrong command line.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dirmerge.cli import align, demo, doctor, inspect, merge, plan

app = typer.Typer(
    name="dirmerge",
    help="Merge fine-tuned models by their directions: DC-Merge, MDA and their baselines.",
    epilog="Exit codes: 0 done, 1 a bug, 2 wrong command line, 3 recipe, 4 unreadable input, "
    "5 inputs that do not fit together, 6 output, 7 NaN or Inf, 8 a download of the demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        from dirmerge import __version__

        typer.echo(f"dirmerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Merge fine-tuned models by their directions: DC-Merge, MDA and their baselines."""


for command in (plan.plan, merge.merge, align.align, inspect.inspect, doctor.doctor, demo.demo):
    app.command()(command)


def main() -> None:
    """Runs the command line."""
    app()
