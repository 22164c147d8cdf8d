"""Speed and memory of whole commands: `dirmerge merge` against reading its inputs and copying its output.

    python -m benchmarks.throughput                              every part
    python -m benchmarks.throughput --parts models --layers 8    one part, one size
    python -m benchmarks.throughput --parts mergekit --mergekit path/to/mergekit-yaml

    part      what is measured                                             reference
    models    task arithmetic and TIES of three Llama-shaped fine-tunes    cat of the inputs, cp of the output
    mergekit  the same two merges                                          mergekit
    memory    the same two merges under --memory                           the budget
    adapters  the sum of eight rank-16 adapters of 7B shape, as one        cat of the inputs, cp of the output
    many      the average of 400 models of three tiny tensors              the start-up of the command
    cover     DC-Merge of eight full fine-tunes of one matrix              its dense form

Inputs are synthetic and made once per run in a temporary folder. Every result is checked before a time is
kept. A command and its reference take turns with the page cache warm, and medians count. The rows go to
results/throughput/, one file for each machine; results/throughput.md shows them all.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dirmerge
from benchmarks import machine, pipelines, synthetic
from benchmarks.synthetic import Llama
from benchmarks.throughput_page import RESULTS, Row, page

METHODS = ("task_arithmetic", "ties")
MODEL_TASKS, ADAPTER_TASKS = 3, 8
SMALL, LARGE, SEVEN_BILLION = Llama(8), Llama(24), Llama(32, hidden=4096, intermediate=11008)
# The goals: largest ratios, smallest factors. Inputs of other sizes have none.
MAX_RATIO = {
    ("task_arithmetic", SMALL): 5.0,
    ("task_arithmetic", LARGE): 3.5,
    ("ties", SMALL): 7.0,
    ("ties", LARGE): 5.0,
}
MIN_FASTER = {("task_arithmetic", SMALL): 3.0, ("ties", SMALL): 10.0}
MAX_ADAPTERS, MANY, MAX_MANY_S = 4.0, 400, 2.0
# mergekit subtracts in bfloat16 and breaks ties at the threshold of TIES by position; dirmerge subtracts in
# float32 and keeps all of them. A wrong λ or a sum in place of a mean would be more than 0.5 away.
MERGEKIT_TOLERANCE = 0.25

# The peak of a child process is at least that of the process that starts it: Linux carries it through exec.
# So commands are started by a small interpreter, not by this one, which holds torch and whole tensors.
_MEASURE = """
import json, os, sys, time
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
redirect = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, file_actions=redirect)
_, status, usage = os.wait4(pid, 0)
elapsed = time.perf_counter() - start
unit = 1 if sys.platform == "darwin" else 1024
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([elapsed, cpu, usage.ru_maxrss * unit / 1e6, os.waitstatus_to_exitcode(status)]))
"""


class CommandError(RuntimeError):
    """A measured command failed.

    Args:
        arguments: the command.
        code: its exit status.
        output: the last lines that it printed.
    """

    def __init__(self, arguments: Sequence[str | Path], code: int, output: str) -> None:
        super().__init__(f"{' '.join(map(str, arguments))} exited with {code}:\n{output}")
        self.output = output


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds of wall time, of CPU time, and peak resident megabytes (10⁶ bytes)."""

    seconds: float
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Setting:
    """What the parts share.

    Attributes:
        folder: temporary folder for inputs and outputs.
        repeats: measurements of each command.
        llama: sizes of the models other than their layers.
        layers: numbers of layers, one model each.
        mergekit: the mergekit-yaml command, None to skip it.
        budgets: values of `--memory`.
        device: value of `--device`, None to leave the option out.
        adapter_llama: the model that the adapters are for.
        many: number of models of the part `many`.
        cover: sizes of the matrices of the part `cover`.
    """

    folder: Path
    repeats: int
    llama: Llama
    layers: tuple[int, ...]
    mergekit: Path | None
    budgets: tuple[str, ...]
    device: str | None
    adapter_llama: Llama
    many: int
    cover: tuple[int, ...]


def run_command(arguments: Sequence[str | Path], log: Path) -> Usage:
    """Runs a command in a process of its own.

    Raises:
        CommandError: the command failed.
    """
    command = [sys.executable, "-S", "-E", "-c", _MEASURE, str(log), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    elapsed, cpu, peak, code = json.loads(done.stdout)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CommandError(arguments, code, tail)
    return Usage(elapsed, cpu, peak)


def merge_command(setting: Setting, recipe: Path, out: Path, *options: str) -> list[str | Path]:
    """The command line of a merge."""
    device = ["--device", setting.device] if setting.device else []
    return [sys.executable, "-m", "dirmerge", "merge", recipe, "--out", out, *device, *options]


@functools.cache
def has_option(option: str) -> bool:
    """Whether `dirmerge merge` knows an option."""
    done = subprocess.run(
        [sys.executable, "-m", "dirmerge", "merge", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )
    return re.search(rf"{re.escape(option)}\b", done.stdout) is not None


def measure(command: Callable[[], Usage], out: Path) -> Usage:
    """Measures a command that writes `out`, which is removed before; what waits for the disk is written."""
    if out.exists():
        shutil.rmtree(out)
    os.sync()
    return command()


def medians(usages: Sequence[Usage]) -> Usage:
    """The median times, and the largest peak."""
    return Usage(
        statistics.median(usage.seconds for usage in usages),
        statistics.median(usage.cpu_s for usage in usages),
        max(usage.peak_mb for usage in usages),
    )


def files_in(folders: Sequence[Path]) -> list[Path]:
    """The files of some folders."""
    return sorted(path for folder in folders for path in folder.iterdir() if path.is_file())


def size_gb(folders: Sequence[Path]) -> float:
    """Their size in 10⁹ bytes."""
    return sum(path.stat().st_size for path in files_in(folders)) / 1e9


def against_copy(
    setting: Setting,
    inputs: Sequence[Path],
    command: Sequence[str | Path],
    out: Path,
    check: Callable[[], float],
) -> Row:
    """Measures a merge in turns with `cat` of its inputs and `cp` of its output.

    Args:
        setting: folder and repeats.
        inputs: folders that the merge reads.
        command: writes `out`.
        out: the merged folder; it remains.
        check: raises SystemExit for a wrong result; returns its error.
    """
    log, copy, kept = (setting.folder / name for name in ("log", "copy", "kept"))
    measure(lambda: run_command(command, log), out)
    error = check()
    read: list[str | Path] = ["sh", "-c", 'cat "$@" > /dev/null', "sh", *files_in(inputs)]
    written = size_gb([out])
    out.rename(kept)
    run_command(read, log)  # fills the page cache
    usages: dict[str, list[Usage]] = {"cat": [], "cp": [], "merge": []}
    try:
        for _ in range(setting.repeats):
            usages["cat"].append(run_command(read, log))
            usages["cp"].append(measure(lambda: run_command(["cp", "-r", kept, copy], log), copy))
            shutil.rmtree(copy)
            usages["merge"].append(measure(lambda: run_command(command, log), out))
    finally:
        shutil.rmtree(kept)
    cat, cp, merge = (medians(found) for found in usages.values())
    return {
        "read_gb": size_gb(inputs),
        "written_gb": written,
        "cat_s": cat.seconds,
        "cp_s": cp.seconds,
        "seconds": merge.seconds,
        "cpu_s": merge.cpu_s,
        "ratio": merge.seconds / (cat.seconds + cp.seconds),
        "peak_mb": merge.peak_mb,
        "error": error,
    }


@contextmanager
def models(setting: Setting, layers: int) -> Iterator[tuple[Llama, list[Path]]]:
    """Makes a base and its fine-tunes for a number of layers, and removes them at the end."""
    llama = Llama(layers, setting.llama.hidden, setting.llama.intermediate, setting.llama.vocabulary)
    # The inputs, a result, and its copy.
    needed, free = 2 * llama.parameters * (MODEL_TASKS + 4), shutil.disk_usage(setting.folder).free
    if free < needed:
        raise SystemExit(
            f"{layers} layers need {needed / 1e9:.1f} GB in {setting.folder}, and {free / 1e9:.1f} GB are "
            "free; choose another place with --folder, or fewer --layers"
        )
    folder = setting.folder / f"models-{layers}"
    print(f"making models of {llama.parameters / 1e9:.2f} G parameters", flush=True)
    try:
        yield llama, synthetic.write_models(folder, llama, MODEL_TASKS)
    finally:
        shutil.rmtree(folder)


def model_row(setting: Setting, llama: Llama, folders: Sequence[Path], method: str) -> Row:
    """Part `models`: one method at one size."""
    recipe = synthetic.write_recipe(setting.folder / f"{method}.yml", method, folders[0], folders[1:])
    out = setting.folder / "out"
    command = merge_command(setting, recipe, out)
    row = against_copy(setting, folders, command, out, lambda: synthetic.check_models(method, folders, out))
    shutil.rmtree(out)
    case = {"method": method, "layers": llama.layers, "parameters": llama.parameters}
    return {**case, **row, "must": MAX_RATIO.get((method, llama))}


def mergekit_row(setting: Setting, llama: Llama, folders: Sequence[Path], method: str) -> Row:
    """Part `mergekit`: one method, the same recipe for both."""
    assert setting.mergekit is not None  # main skips the part
    recipe = synthetic.write_recipe(setting.folder / f"{method}.yml", method, folders[0], folders[1:])
    log, out, other = (setting.folder / name for name in ("log", "out", "out-mergekit"))
    ours = merge_command(setting, recipe, out)
    theirs: list[str | Path] = [setting.mergekit, recipe, other, "--no-copy-tokenizer", "--quiet"]
    usages: list[tuple[Usage, Usage]] = []
    apart = error = float("nan")
    for repeat in range(setting.repeats):
        mergekit = measure(lambda: run_command(theirs, log), other)
        merge = measure(lambda: run_command(ours, log), out)
        usages.append((merge, mergekit))
        if repeat == 0:
            error = synthetic.check_models(method, folders, out)
            apart = synthetic.difference(folders[0], out, other)
            if not apart <= MERGEKIT_TOLERANCE:
                raise SystemExit(f"{method}: mergekit's update differs by {apart:.3g} of the norm of ours")
    for folder in (out, other):
        shutil.rmtree(folder)
    merge, mergekit = (medians(found) for found in zip(*usages, strict=True))
    return {
        "method": method,
        "layers": llama.layers,
        "parameters": llama.parameters,
        "seconds": merge.seconds,
        "cpu_s": merge.cpu_s,
        "mergekit_s": mergekit.seconds,
        "mergekit_cpu_s": mergekit.cpu_s,
        "faster": mergekit.seconds / merge.seconds,
        "peak_mb": merge.peak_mb,
        "mergekit_mb": mergekit.peak_mb,
        "memory": merge.peak_mb / mergekit.peak_mb,
        "difference": apart,
        "error": error,
        "must": MIN_FASTER.get((method, llama)),
    }


def memory_row(setting: Setting, llama: Llama, folders: Sequence[Path], method: str, budget: str) -> Row:
    """Part `memory`: one method under one budget; a refusal is a row with the command's message."""
    recipe = synthetic.write_recipe(setting.folder / f"{method}.yml", method, folders[0], folders[1:])
    log, out = setting.folder / "log", setting.folder / "out"
    row = {"method": method, "layers": llama.layers, "parameters": llama.parameters, "budget": budget}
    command = merge_command(setting, recipe, out, "--memory", budget)
    try:
        usage = measure(lambda: run_command(command, log), out)
    except CommandError as error:
        if "Traceback" in error.output or "memory" not in error.output.lower():
            raise
        return {**row, "refused": " ".join(error.output.split())}
    synthetic.check_models(method, folders, out)
    shutil.rmtree(out)
    limit = megabytes(budget)
    return {
        **row,
        "seconds": usage.seconds,
        "cpu_s": usage.cpu_s,
        "peak_mb": usage.peak_mb,
        "budget_mb": limit,
    }


def megabytes(budget: str) -> float:
    """A size such as 2GB in 10⁶ bytes."""
    units = {"KB": 1e-3, "MB": 1.0, "GB": 1e3}
    found = re.fullmatch(r"([0-9.]+)\s*([KMG]B)", budget, re.IGNORECASE)
    if found is None:
        raise SystemExit(f"--budgets must be sizes such as 500MB or 2GB, got {budget!r}")
    return float(found[1]) * units[found[2].upper()]


def adapter_rows(setting: Setting) -> list[Row]:
    """Part `adapters`."""
    folder, out = setting.folder / "adapters", setting.folder / "out"
    folders = synthetic.write_adapters(folder, setting.adapter_llama, ADAPTER_TASKS)
    recipe = synthetic.write_recipe(setting.folder / "adapters.yml", "task_arithmetic", None, folders)
    command = merge_command(setting, recipe, out, "--as", "adapter")
    row = against_copy(setting, folders, command, out, lambda: synthetic.check_adapter(folders, out))
    for path in (folder, out):
        shutil.rmtree(path)
    must = MAX_ADAPTERS if setting.adapter_llama == SEVEN_BILLION else None
    return [{"adapters": ADAPTER_TASKS, "rank": synthetic.ADAPTER_RANK, **row, "must": must}]


def many_rows(setting: Setting) -> list[Row]:
    """Part `many`."""
    folder, out, log = (setting.folder / name for name in ("many", "out", "log"))
    base, *folders = synthetic.write_many(folder, setting.many)
    recipe = synthetic.write_recipe(setting.folder / "many.yml", "average", base, folders)
    command = merge_command(setting, recipe, out)
    measure(lambda: run_command(command, log), out)
    error = synthetic.check_models("average", [base, *folders], out)
    two = synthetic.write_recipe(setting.folder / "two.yml", "average", base, folders[:2])
    usages: dict[str, list[Usage]] = {"start": [], "two": [], "merge": []}
    for _ in range(setting.repeats):
        usages["start"].append(run_command([sys.executable, "-m", "dirmerge", "--help"], log))
        usages["two"].append(measure(lambda: run_command(merge_command(setting, two, out), log), out))
        usages["merge"].append(measure(lambda: run_command(command, log), out))
    for path in (folder, out):
        shutil.rmtree(path)
    start, merge_of_two, merge = (medians(found) for found in usages.values())
    return [
        {
            "models": setting.many,
            "start_s": start.seconds,
            "two_models_s": merge_of_two.seconds,
            "seconds": merge.seconds,
            "cpu_s": merge.cpu_s,
            "per_model_s": (merge.seconds - merge_of_two.seconds) / (setting.many - 2),
            "peak_mb": merge.peak_mb,
            "error": error,
            "must": MAX_MANY_S if setting.many == MANY else None,
        }
    ]


def cover_row(setting: Setting, size: int) -> Row:
    """Part `cover`: one size, in this process.

    The check is pipelines.full's: each task's kept energy is at least 0.99 of the best; the cosine is stated.
    Entries close to the threshold of the filter fall on either side of it, so the updates may differ.
    """
    tasks = ADAPTER_TASKS
    generator = torch.Generator().manual_seed(size)
    deltas = [pipelines.fine_tune_delta(size, generator) for _ in range(tasks)]
    times: dict[str, list[float]] = {"dense": [], "dirmerge": []}
    row: Row = {"size": size, "tasks": tasks}
    for _ in range(setting.repeats):
        start = time.perf_counter()
        dense, best = pipelines.dc_merge_dense(deltas, size // tasks, is_averaged=False, width=size)
        middle = time.perf_counter()
        merged = dirmerge.merge_deltas(deltas, "dc_merge")
        times["dirmerge"].append(time.perf_counter() - middle)
        times["dense"].append(middle - start)
        value, truth = merged.dense().double().flatten(), dense.double().flatten()
        row["cosine"] = float(value @ truth / (value.norm() * truth.norm()))
        row["energy"] = min(have / most for have, most in zip(merged.record.energy, best, strict=True))
        if not row["energy"] >= 0.99:
            raise SystemExit(f"DC-Merge of {size}² keeps {row['energy']:.4f} of the best energy")
    found = {name: statistics.median(spent) for name, spent in times.items()}
    dense_s, seconds_ = found["dense"], found["dirmerge"]
    return {**row, "dense_s": dense_s, "seconds": seconds_, "faster": dense_s / seconds_, "must": 1.0}


MODEL_PARTS = ("models", "mergekit", "memory")
PARTS = (*MODEL_PARTS, "adapters", "many", "cover")


def skipped(part: str, setting: Setting) -> str | None:
    """Why a part cannot run here; None if it can."""
    if part == "mergekit" and setting.mergekit is None:
        return "give the command with --mergekit path/to/mergekit-yaml"
    if part == "memory" and not has_option("--memory"):
        return "`dirmerge merge` has no option --memory"
    return None


def measured(part: str, setting: Setting) -> Iterator[Row]:
    """The rows of a part that needs no models."""
    if part == "adapters":
        yield from adapter_rows(setting)
    elif part == "many":
        yield from many_rows(setting)
    else:
        for size in setting.cover:
            yield cover_row(setting, size)


def measured_on_models(part: str, setting: Setting, llama: Llama, folders: list[Path]) -> Iterator[Row]:
    """The rows of a part for models of one size."""
    for method in METHODS:
        if part == "models":
            yield model_row(setting, llama, folders, method)
        elif part == "mergekit":
            yield mergekit_row(setting, llama, folders, method)
        else:
            for budget in setting.budgets:
                yield memory_row(setting, llama, folders, method, budget)


def run(parts: Sequence[str], setting: Setting) -> Iterator[tuple[str, Row]]:
    """Measures parts and yields their rows. Only `models` runs at every size, the others at the smallest."""
    possible = []
    for part in parts:
        reason = skipped(part, setting)
        if reason is None:
            possible.append(part)
        else:
            print(f"{part}: skipped: {reason}", flush=True)
    on_models = [part for part in MODEL_PARTS if part in possible]
    for layers in setting.layers:
        chosen = on_models if layers == min(setting.layers) else [p for p in on_models if p == "models"]
        if chosen:
            with models(setting, layers) as (llama, folders):
                for part in chosen:
                    yield from ((part, row) for row in measured_on_models(part, setting, llama, folders))
    for part in possible:
        if part not in MODEL_PARTS:
            yield from ((part, row) for row in measured(part, setting))


KEYS = {
    "models": ("method", "layers", "parameters"),
    "mergekit": ("method", "layers", "parameters"),
    "memory": ("method", "layers", "parameters", "budget"),
    "adapters": ("adapters", "rank", "read_gb"),
    "many": ("models",),
    "cover": ("size", "tasks"),
}


def save(part: str, row: Row, about: dict[str, Any], folder: Path) -> Path:
    """Adds a row to the file of a machine, where it replaces the row of the same case."""
    label = f"{about['gpu'] or about['cpu']} {about['cores']} cores"
    path = folder / f"{re.sub('[^a-z0-9]+', '-', label.lower()).strip('-')}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    rows = {tuple(known[key] for key in KEYS[part]): known for known in content.get(part, [])}
    rows[tuple(row[key] for key in KEYS[part])] = {**row, "machine": about}
    content[part] = list(rows.values())
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures parts, keeps their rows and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--layers", type=int, nargs="+", default=[8, 24], help="sizes of the models; default 8 24")
    add("--mergekit", type=Path, metavar="PATH", help="the command mergekit-yaml of mergekit 0.1.5")
    add("--repeats", type=int, default=3, help="measurements of each command; default 3")
    add("--folder", type=Path, metavar="DIR", help="place of the temporary folder")
    add("--budgets", nargs="+", default=["1GB", "2GB", "4GB"], help="values of --memory; default 1GB 2GB 4GB")
    add("--device", help="passed on to `dirmerge merge`")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results/throughput")
    sizes = parser.add_argument_group("shapes of the inputs")
    sizes.add_argument("--hidden", type=int, default=2048)
    sizes.add_argument("--intermediate", type=int, default=5632)
    sizes.add_argument("--vocabulary", type=int, default=32000)
    shape = [SEVEN_BILLION.layers, SEVEN_BILLION.hidden, SEVEN_BILLION.intermediate]
    names = ("LAYERS", "HIDDEN", "INTERMEDIATE")
    sizes.add_argument("--adapter-shape", type=int, nargs=3, default=shape, metavar=names)
    sizes.add_argument("--many", type=int, default=MANY, help="models of the part many; default 400")
    sizes.add_argument("--cover", type=int, nargs="+", default=[2048, 4096], help="default 2048 4096")
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {chosen.repeats}")
    if chosen.many < 3:
        parser.error(f"--many must be at least 3, got {chosen.many}")
    for budget in chosen.budgets:
        megabytes(budget)
    if chosen.mergekit and not shutil.which(chosen.mergekit):
        parser.error(f"--mergekit must be a command, got {chosen.mergekit}")
    if chosen.device and not has_option("--device"):
        parser.error("`dirmerge merge` has no option --device")
    about = machine.describe("cuda" if str(chosen.device).startswith("cuda") else "cpu")
    written = chosen.results.with_suffix(".md")
    with tempfile.TemporaryDirectory(prefix="dirmerge-throughput-", dir=chosen.folder) as folder:
        setting = Setting(
            folder=Path(folder),
            repeats=chosen.repeats,
            llama=Llama(0, chosen.hidden, chosen.intermediate, chosen.vocabulary),
            layers=tuple(sorted(set(chosen.layers))),
            mergekit=chosen.mergekit,
            budgets=tuple(chosen.budgets),
            device=chosen.device,
            adapter_llama=Llama(*chosen.adapter_shape),
            many=chosen.many,
            cover=tuple(chosen.cover),
        )
        for part, row in run(chosen.parts, setting):
            print(f"{part}: {json.dumps(row)}", flush=True)
            save(part, row, about, chosen.results)
            written.write_text(page(chosen.results))
    print(f"{written} written")


if __name__ == "__main__":
    # An exit removes the temporary folder, gigabytes of it; the default of SIGTERM would leave it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
