"""Options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


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
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's.")]
AsKind = Annotated[OutputKind, typer.Option("--as", help="Write a model, or a PEFT adapter (from adapters).")]
Rank = Annotated[
    int | None,
    typer.Option("--rank", min=1, help="Rank of the adapter (--as adapter); default: the sum of all ranks."),
]
Log = Annotated[LogKind, typer.Option("--log", help="text, or json: one object per line on standard output.")]


def use_threads(threads: int | None) -> None:
    """Sets the CPU threads of this process; None leaves torch's choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
