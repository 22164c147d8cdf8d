"""The command line: parses, calls, prints. Exit codes are those of dirmerge.errors, 2 a wrong usage."""

from __future__ import annotations

import contextlib
import enum
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dirmerge.errors import DirmergeError, OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from dirmerge.alignment.run import AlignProgress, AlignResult
    from dirmerge.diagnostics import Inspection
    from dirmerge.engine.result import MergeResult, Progress
    from dirmerge.planning import Plan, TensorPlan

app = typer.Typer(
    name="dirmerge",
    help="Merge fine-tuned models by their directions: DC-Merge, MDA and their baselines.",
    epilog="Exit codes: 0 done, 1 a bug, 2 wrong command line, 3 recipe, 4 unreadable input, "
    "5 inputs that do not fit together, 6 output, 7 NaN or Inf, 8 a download of the demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class OutputKind(str, enum.Enum):
    """What is written."""

    model = "model"
    adapter = "adapter"


class LogKind(str, enum.Enum):
    """How progress is shown."""

    text = "text"
    json = "json"


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file, mergekit's schema and our keys.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; it appears complete or not at all.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the folder if dirmerge wrote it and it holds no input.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default torch's.")]
AsKind = Annotated[OutputKind, typer.Option("--as", help="Write a model, or a PEFT adapter (from adapters).")]
Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Rank of the adapter written; default Σ r_t.")
]
Log = Annotated[LogKind, typer.Option("--log", help="text, or json: one object per line on standard output.")]


def _version(value: bool) -> None:
    if value:
        from dirmerge import __version__

        typer.echo(f"dirmerge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Merge fine-tuned models by their directions: DC-Merge, MDA and their baselines."""


@app.command()
def plan(
    recipe: RecipePath,
    kind: AsKind = OutputKind.model,
    rank: Rank = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
) -> None:
    """Show what a merge will do, from the headers of its inputs: no weight is read, nothing is written."""
    with _errors(LogKind.json if as_json else LogKind.text):
        from dirmerge import api

        planned = api.plan(recipe, as_adapter=kind is OutputKind.adapter, rank=rank)
        if as_json:
            typer.echo(json.dumps(planned.to_dict(), indent=1, ensure_ascii=False))
        else:
            _print_plan(planned)
        planned.close()


@app.command()
def merge(
    recipe: RecipePath,
    out: Out,
    kind: AsKind = OutputKind.model,
    rank: Rank = None,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", help="Largest weight file, such as 5GB; default the recipe's."),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    log: Log = LogKind.text,
) -> None:
    """Merge the models of a recipe into one folder."""
    with _errors(log):
        import torch

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
        if threads is not None:
            torch.set_num_threads(threads)
        planned = api.plan(loaded, as_adapter=kind is OutputKind.adapter, rank=rank)
        if log is LogKind.json:
            _print_json(
                {"event": "plan", "method": planned.method_name, **planned.totals(), "notes": planned.notes}
            )
            result = pipeline.run(planned, out, overwrite=overwrite, progress=_json_progress)
            _print_json({"event": "done", **result.to_dict()})
            return
        for note in planned.notes:
            typer.echo(f"note: {note}", err=True)
        with _bar() as update:
            result = pipeline.run(planned, out, overwrite=overwrite, progress=update)
        _print_summary(result)


@app.command()
def align(
    recipe: RecipePath,
    out: Out,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="File (.safetensors) from which an interrupted learning goes on."),
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    log: Log = LogKind.text,
) -> None:
    """Merge, and align every task's features with unlabelled data: one backbone, a head per task."""
    with _errors(log):
        import torch

        from dirmerge.alignment.run import align as run_align

        if threads is not None:
            torch.set_num_threads(threads)
        if log is LogKind.json:
            result = run_align(recipe, out, overwrite=overwrite, state=state, progress=_json_align)
            _print_json({"event": "done", "path": str(result.path), **result.to_dict()})
            return
        with _align_bar() as update:
            result = run_align(recipe, out, overwrite=overwrite, state=state, progress=update)
        _print_alignment(result)


@app.command()
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
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no progress and no summary.")] = False,
) -> None:
    """Measure a merge by its directions: task spaces, their conflicts, what the merged update keeps."""
    with _errors(LogKind.text):
        import torch

        from dirmerge.diagnostics import inspect as run_inspect
        from dirmerge.diagnostics import report

        try:
            # What cannot be written is told before the work.
            report.check(html, as_json, overwrite=overwrite)
        except ModuleNotFoundError as error:
            typer.echo(f"the report needs {error.name}: pip install 'dirmerge[report]'", err=True)
            raise typer.Exit(1) from error
        if threads is not None:
            torch.set_num_threads(threads)
        if quiet:
            found = run_inspect(source)
        else:
            with _bar() as update:
                found = run_inspect(source, progress=update)
        report.write(found, html, as_json)
        if not quiet:
            _print_inspection(found, [path for path in (html, as_json) if path is not None])


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show versions, native library and backends, what is missing and how to get it."""
    from dirmerge.doctor import examine

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
        return
    console = _console()
    console.print(
        _table("Versions", ["package", "version"], [[n, v or "missing"] for n, v in report.versions.items()])
    )
    native = report.native if isinstance(report.native, dict) else {"missing": report.native}
    console.print(_table("Native library", ["", ""], [[key, str(value)] for key, value in native.items()]))
    cuda = report.cuda if isinstance(report.cuda, dict) else {"missing": report.cuda}
    console.print(_table("CUDA library", ["", ""], [[key, str(value)] for key, value in cuda.items()]))
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for op, device, dtype, implementation, reason in report.backends:
        grouped.setdefault((op, device, implementation, reason), []).append(dtype)
    rows = [
        [op, device, ", ".join(dtypes), implementation, reason]
        for (op, device, implementation, reason), dtypes in grouped.items()
    ]
    console.print(_table("Backends", ["op", "device", "dtype", "runs", "because"], rows))
    console.print(f"threads: {report.threads}")
    for line in report.advice:
        console.print(f"- {line}", markup=False, highlight=False)
    if not report.advice:
        console.print("Nothing is missing.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for results, picture and merged model.")] = Path(
        "demo-out"
    ),
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; repeat for more.")] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Only this method; repeat for more.")
    ] = None,
    texts: Annotated[
        int, typer.Option("--texts", min=1, help="At most so many test texts of each task.")
    ] = 400,
) -> None:
    """Merge eight real adapters of a real transformer by every method and evaluate the results."""
    with _errors(LogKind.text):
        try:
            from dirmerge.demo import run

            run.main(out, tasks=task, methods=method, texts=texts)
        except ModuleNotFoundError as error:
            from dirmerge.doctor import DEMO

            if (error.name or "").split(".")[0] not in DEMO:
                raise
            typer.echo(f"the demo needs {error.name}: pip install 'dirmerge[demo]'", err=True)
            raise typer.Exit(1) from error


def main() -> None:
    """Run the command line."""
    app()


@contextlib.contextmanager
def _errors(log: LogKind) -> Iterator[None]:
    """Turn errors that the user can act on into one sentence on standard error and their exit code."""
    try:
        with _termination():
            yield
    except DirmergeError as error:
        if log is LogKind.json:
            _print_json({"event": "error", "message": str(error), "exit_code": error.exit_code})
        typer.echo(f"dirmerge: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo("dirmerge: interrupted, nothing was written", err=True)
        raise typer.Exit(130) from error
    except _Terminated as error:
        typer.echo("dirmerge: terminated, nothing was written", err=True)
        raise typer.Exit(128 + signal.SIGTERM) from error


class _Terminated(BaseException):
    """SIGTERM came: everything on the way out cleans up, as after Ctrl-C."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Raise _Terminated at SIGTERM, instead of leaving files behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_json(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _json_progress(step: Progress) -> None:
    _print_json(
        {
            "event": "tensor",
            "phase": step.phase,
            "name": step.name,
            "done": step.done,
            "total": step.total,
            "written_bytes": step.written_bytes,
            "output_bytes": step.output_bytes,
        }
    )


def _json_align(step: AlignProgress) -> None:
    _print_json(
        {"event": "align", "phase": step.phase, "name": step.name, "done": step.done, "total": step.total}
    )


@contextlib.contextmanager
def _align_bar() -> Iterator[Callable[[AlignProgress], None]]:
    """Show a progress bar on standard error that names the phase."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("merge", total=1.0, what="")

        def update(step: AlignProgress) -> None:
            what = f"{step.done}/{step.total} {step.name}"
            bar.update(task, description=step.phase, completed=step.done, total=step.total, what=what)

        yield update


def _print_alignment(result: AlignResult) -> None:
    console = _console()
    _print_summary(result.merge)
    if result.fits is not None:
        rows = [
            [fit.name, str(fit.inputs)]
            + [f"{100 * f.agreement:.1f}" if f else "" for f in (fit.plain, fit.aligned, fit.control)]
            for fit in result.fits
        ]
        title = "Agreement with each task's own fine-tune, % of the inputs held out"
        console.print(_table(title, ["task", "inputs", "merged", "aligned", "base aligned (control)"], rows))
    if result.learned is not None:
        learned = result.learned
        console.print(f"learned  {learned.steps} steps, kept the state of step {learned.best_step}")
    for note in result.notes:
        console.print(f"note     {note}", markup=False, highlight=False)
    console.print(f"heads    {', '.join(result.heads)}", markup=False, highlight=False)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Show progress on standard error: a bar on a terminal, lines in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]} tensors"),
        TextColumn("{task.fields[bytes]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _ProgressLines(time.monotonic)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merge", total=1.0, tensors="0", bytes="")

        def update(step: Any) -> None:
            bar.update(
                task,
                description=step.phase,
                completed=step.work,
                tensors=f"{step.done}/{step.total}",
                bytes=(
                    f"{_bytes(step.written_bytes)}/{_bytes(step.output_bytes)}" if step.output_bytes else ""
                ),
            )

        yield update


class _ProgressLines:
    """Prints a line on standard error every LINE_SECONDS, so that an hour's merge is not silent in a log.

    Args:
        clock: seconds.
    """

    LINE_SECONDS = 10.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = self._last = clock()

    def __call__(self, step: Progress) -> None:
        now = self._clock()
        if now - self._last < self.LINE_SECONDS:
            return
        self._last = now
        seconds = now - self._started
        parts = [f"{step.phase}: {step.done}/{step.total} tensors", f"{100 * step.work:.0f} %"]
        if step.output_bytes:
            parts.append(f"{_bytes(step.written_bytes)}/{_bytes(step.output_bytes)} written")
        parts.append(f"{seconds:.0f} s")
        if step.work > 0:
            parts.append(f"about {seconds * (1 - step.work) / step.work:.0f} s left")
        typer.echo(", ".join(parts), err=True)


def _print_plan(planned: Plan) -> None:
    console = _console()
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
    console.print(_table(None, columns, rows))
    totals = planned.totals()
    counts = ", ".join(f"{count} {rule}" for rule, count in sorted(totals["tensors"].items()))
    console.print(f"tensors {counts}", highlight=False)
    console.print(
        f"output  {planned.output}, {totals['parameters']:,} parameters, {_bytes(totals['output_bytes'])}; "
        f"about {totals['flops'] / 1e9:,.1f} GFLOP, largest step needs {_bytes(totals['peak_bytes'])}",
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


def _print_summary(result: MergeResult) -> None:
    console = _console()
    rules = ", ".join(f"{count} {rule}" for rule, count in sorted(result.rules.items()))
    rows = [
        ["method", result.method],
        ["scale", result.scale_text()],
        ["tensors", rules],
        ["time", f"{result.seconds:.1f} s"],
        ["peak memory", _bytes(result.peak_rss)],
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
    console.print(_table("Merged", ["", ""], rows))


def _print_inspection(found: Inspection, written: list[Path]) -> None:
    from dirmerge.diagnostics.report import fixed, key_figures, number, share, short_names

    console = _console()
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
    console.print(_table(f"{found.method}, {len(found.parameters)} matrices", columns, rows))
    figures = [["scale", found.scale, ""], *([*figure] for figure in key_figures(found.summary))]
    console.print(_table("Model", ["", "", ""], figures))
    for path in written:
        console.print(f"written {path}", markup=False, highlight=False)


def _console() -> Any:
    from rich.console import Console

    # A terminal's width, but enough for a table when the output goes to a file.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _table(title: str | None, columns: list[str], rows: list[list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=0 < i < len(columns) - 1)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
