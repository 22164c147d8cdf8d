"""`dirmerge doctor`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dirmerge.cli.tables import make_table, open_console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Shows versions, native library and backends, what is missing and how to get it."""
    from dirmerge.doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
        return
    console = open_console()
    versions = [[name, version or "missing"] for name, version in report.versions.items()]
    console.print(make_table("Versions", ["package", "version"], versions))
    console.print(make_table("Native library", ["", ""], _rows(report.native)))
    console.print(make_table("CUDA library", ["", ""], _rows(report.cuda)))
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for op, device, dtype, implementation, reason in report.backends:
        grouped.setdefault((op, device, implementation, reason), []).append(dtype)
    rows = [
        [op, device, ", ".join(dtypes), implementation, reason]
        for (op, device, implementation, reason), dtypes in grouped.items()
    ]
    console.print(make_table("Backends", ["op", "device", "dtype", "runs", "because"], rows))
    console.print(f"threads: {report.threads}")
    for line in report.advice:
        console.print(f"- {line}", markup=False, highlight=False)
    if not report.advice:
        console.print("Nothing is missing.")


def _rows(library: dict[str, Any] | str) -> list[list[str]]:
    facts = library if isinstance(library, dict) else {"missing": library}
    return [[name, str(value)] for name, value in facts.items()]
