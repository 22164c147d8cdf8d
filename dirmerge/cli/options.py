"""Options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dirmerge.engine.compute import Compute


class OutputKind(str, enum.Enum):
    """Kind of output."""

    model = "model"
    adapter = "adapter"


class LogKind(str, enum.Enum):
    """Form of progress and result."""

    text = "text"
    json = "json"


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file: mergekit's schema and dirmerge's keys.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; it is written atomically.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the folder if dirmerge wrote it and it holds no input.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto (the GPUs that are there, else the CPU), cpu, cuda, or cuda:N[,cuda:M]."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's.")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Most memory to use, such as 12GB: of the host, and of each GPU; default: no limit."
    ),
]
AsKind = Annotated[OutputKind, typer.Option("--as", help="Write a model, or a PEFT adapter (from adapters).")]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Rank of the adapter (--as adapter); default: the sum of all ranks."),
]
Log = Annotated[LogKind, typer.Option("--log", help="text, or json: one object per line on standard output.")]


def resolve_compute(device: str, threads: int | None, memory: str | None) -> Compute:
    """Returns where a command runs; a wrong command line for what cannot be understood or is not there."""
    from dirmerge.engine.compute import Compute
    from dirmerge.recipe import parse_size

    try:
        size = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from error
    try:
        return Compute.resolve(device, threads, size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
