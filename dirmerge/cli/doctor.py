"""`dirmerge doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dirmerge.cli.tables import bytes_text, make_table, open_console

if TYPE_CHECKING:
    from dirmerge.doctor import Report


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Shows devices and memory, versions and backends, what is missing and how to get it."""
    from dirmerge.doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
        return
    console = open_console()
    console.print(make_table("Machine", ["", ""], _machine(report)))
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
    for line in report.advice:
        console.print(f"- {line}", markup=False, highlight=False)
    if not report.advice:
        console.print("Nothing is missing.")


def _machine(report: Report) -> list[list[str]]:
    """Returns the rows of the machine's table: what auto chooses, the host, and every GPU."""
    from dirmerge.engine.result import compute_text

    host = report.host
    rows = [
        ["--device auto", compute_text(report.compute)],
        [
            "processors",
            f"{host['usable_processors']} of {host['processors']}; torch uses {report.threads} threads",
        ],
        ["memory", _memory(host["available_memory"], host["memory"])],
    ]
    for gpu in report.gpus:
        memory = gpu.get("error") or _memory(gpu["free_memory"], gpu["memory"])
        rows.append([gpu["device"], f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"])
    return rows


def _memory(free: int | None, total: int | None) -> str:
    if free is None or total is None:
        return "unknown"
    return f"{bytes_text(free)} free of {bytes_text(total)}"


def _rows(library: dict[str, Any] | str) -> list[list[str]]:
    facts = library if isinstance(library, dict) else {"missing": library}
    return [[name, str(value)] for name, value in facts.items()]
