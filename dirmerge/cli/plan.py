"""`dirmerge plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dirmerge.cli.errors import report_errors
from dirmerge.cli.options import AsKind, LogKind, OutputKind, Rank, RecipePath
from dirmerge.cli.tables import bytes_text, make_table, open_console

if TYPE_CHECKING:
    from dirmerge.planning import Plan, TensorPlan


def plan(
    recipe: RecipePath,
    kind: AsKind = OutputKind.model,
    rank: Rank = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Shows what a merge will do, from the headers of its inputs: it reads no weight and writes nothing."""
    with report_errors(LogKind.json if as_json else LogKind.text):
        from dirmerge import api

        planned = api.plan(recipe, as_adapter=kind is OutputKind.adapter, rank=rank)
        if as_json:
            typer.echo(json.dumps(planned.to_dict(), indent=1, ensure_ascii=False))
        else:
            _print_plan(planned)
        planned.close()


def _print_plan(planned: Plan) -> None:
    console = open_console()
    base = planned.base.label if planned.base is not None else "none"
    console.print(f"method  {planned.method_name}: {planned.method.summary}", markup=False, highlight=False)
    console.print(f"base    {base}", markup=False, highlight=False)
    for task in planned.tasks:
        console.print(f"task    {task.label} ({task.kind})", markup=False, highlight=False)
    console.print(f"scale   {planned.scale.describe()}", markup=False, highlight=False)
    groups: dict[tuple[Any, ...], list[TensorPlan]] = {}
    for tensor in planned.tensors:
        groups.setdefault(_group(tensor), []).append(tensor)
    rows = []
    for (pattern, *_), members in groups.items():
        first = members[0]
        title = pattern if len(members) > 1 else first.name
        notes = f" ({'; '.join(first.notes)})" if first.notes else ""
        rows.append(
            [
                title,
                str(len(members)),
                "×".join(str(size) for size in first.shape) or "scalar",
                str(first.dtype).removeprefix("torch."),
                first.rule,
                _sources(first),
                str(first.rank) if first.rank is not None else "",
                first.why + notes,
            ]
        )
    columns = ["tensor", "count", "shape", "dtype", "rule", "inputs", "rank", "why"]
    console.print(make_table(None, columns, rows))
    totals = planned.totals()
    counts = ", ".join(f"{count} {rule}" for rule, count in sorted(totals["tensors"].items()))
    console.print(f"tensors {counts}", highlight=False)
    console.print(
        f"output  {planned.output}, {totals['parameters']:,} parameters, "
        f"{bytes_text(totals['output_bytes'])}; "
        f"about {totals['flops'] / 1e9:,.1f} GFLOP, largest step needs {bytes_text(totals['peak_bytes'])}",
        highlight=False,
    )
    for note in planned.notes:
        console.print(f"note    {note}", markup=False, highlight=False)


def _group(tensor: TensorPlan) -> tuple[Any, ...]:
    from dirmerge.planning.names import layer_pattern

    dtype, sources = str(tensor.dtype), _sources(tensor)
    return (layer_pattern(tensor.name), tensor.shape, dtype, tensor.rule, tensor.why, sources, tensor.rank)


def _sources(tensor: TensorPlan) -> str:
    dense = sum(1 for source in tensor.sources if source.rank is None)
    ranks = sorted(source.rank for source in tensor.sources if source.rank is not None)
    parts = [f"{dense} dense"] if dense else []
    if ranks:
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}–{ranks[-1]}"
        parts.append(f"{len(ranks)} of rank {span}")
    return ", ".join(parts)
