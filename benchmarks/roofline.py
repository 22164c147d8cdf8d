"""Predicts what merges would cost on GPUs, from what they launch: benchmarks/results/roofline.json and .md.

    python -m benchmarks.roofline        records every case anew (minutes), writes both files

Nothing runs on a GPU. benchmarks.launches records what the program launches on the tests' shadow GPU, and
each launch is priced here by public peak figures.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.launches import ITEMSIZE, Log, record
from benchmarks.shapes import ADAPTER_RANK, BLOCKS, MODELS, TASKS
from dirmerge.backends import table
from dirmerge.methods import METHODS

if TYPE_CHECKING:
    from shadow import Launch

RESULTS = Path(__file__).parent / "results" / "roofline.json"
PAGE = RESULTS.with_suffix(".md")
ROOT = Path(__file__).parents[1]

# Seconds, assumptions: torch's eager mode from call to call, and a wait of the host until it queues again.
LAUNCH = 5e-6
SYNC = 20e-6
# A local NVMe drive's sequential reading, an assumption: what stands before a checkpoint is seldom faster.
FILE_BANDWIDTH = 7e9
# Of the library's factorisations: sweeps of a Jacobi SVD, columns of a panel of a blocked factorisation, and
# the largest matrix of which torch hands a batch of eigenproblems or SVDs over at once.
SWEEPS = 8
PANEL = 64
BATCHED = 32


@dataclass(frozen=True)
class GPU:
    """Peak figures of one GPU.

    Attributes:
        name: of the card.
        flops: dense FLOP/s by arithmetic; `matrix64` is float64 on tensor cores, `fp64` without them.
        memory: bytes/s of its memory.
        bus: bytes/s of PCIe in one direction.
    """

    name: str
    flops: dict[str, float]
    memory: float
    bus: float


GPUS = (
    GPU(
        "A100",
        {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "matrix64": 19.5e12, "fp64": 9.7e12},
        2.039e12,
        32e9,
    ),
    GPU(
        "H100",
        {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12, "matrix64": 67e12, "fp64": 34e12},
        3.35e12,
        64e9,
    ),
    GPU(
        "B200",
        {"bf16": 2250e12, "tf32": 1100e12, "fp32": 80e12, "matrix64": 40e12, "fp64": 40e12},
        8e12,
        64e9,
    ),
)
SOURCES = """\
| figure | A100 SXM 80 GB (sm_80) | H100 SXM (sm_90) | B200 HGX (sm_100) |
|---|---:|---:|---:|
| BF16, dense | 312 TFLOP/s | 989 TFLOP/s | 2250 TFLOP/s |
| TF32, dense | 156 TFLOP/s | 494.5 TFLOP/s | 1100 TFLOP/s |
| FP32, no tensor cores | 19.5 TFLOP/s | 67 TFLOP/s | 80 TFLOP/s |
| FP64, tensor cores | 19.5 TFLOP/s | 67 TFLOP/s | 40 TFLOP/s |
| FP64, no tensor cores | 9.7 TFLOP/s | 34 TFLOP/s | 40 TFLOP/s |
| memory | 2.039 TB/s | 3.35 TB/s | 8 TB/s |
| PCIe, one direction | 32 GB/s | 64 GB/s | 64 GB/s |

Sources: NVIDIA's data sheets of A100 and H100, which print TF32 and BF16 of H100 with sparsity (half of that
is dense), and the public tables of NVIDIA's Blackwell brief for a B200 of 1000 W. PCIe is generation 4 and 5.
"""


@dataclass(frozen=True)
class Work:
    """What one launch has to do.

    Attributes:
        part: products, factorisations or elementwise.
        unit: the arithmetic that its FLOPs run in.
        flops: of that arithmetic. A float32 product on tensor cores is three of TF32 or bfloat16.
        nbytes: that it reads and writes.
        steps: rounds that wait for each other; 0 for memory that is only allocated.
    """

    part: str
    unit: str = "fp32"
    flops: float = 0.0
    nbytes: float = 0.0
    steps: int = 1

    def seconds(self, gpu: GPU) -> tuple[float, str]:
        """Returns the longest of computing, moving and taking the steps one by one, and which it is."""
        limits = {
            "arithmetic": self.flops / gpu.flops[self.unit],
            "memory": self.nbytes / gpu.memory,
            "steps": self.steps * LAUNCH,
        }
        binding = max(limits, key=lambda name: limits[name])
        return limits[binding], binding


def _delta_sketch(launch: Launch) -> Work:
    # Base, T weights, perhaps a test matrix; the value, T sums, T counts.
    *_, (T, _, width), _, _ = launch.shapes
    m, n = launch.shapes[0]
    is_given = len(launch.shapes) == T + 5
    return Work("products", "tf32" if is_given else "bf16", 3 * 2.0 * T * m * n * width, launch.nbytes)


def _gram(launch: Launch) -> Work:
    *batch, m, n = launch.shapes[0]
    flops = float(math.prod(batch) * m * n * (n + 1))  # of the upper triangle
    if launch.dtypes[0] == torch.float32:
        return Work("products", "tf32", 3 * flops, launch.nbytes)
    return Work("products", "bf16", flops, launch.nbytes)


def _polar_step(launch: Launch) -> Work:
    # Three launches: XᵀX and the polynomial by their upper triangle, and the product.
    *batch, m, k = launch.shapes[0]
    count = math.prod(batch)
    flops = count * float(m * k * (k + 1) + k * k * (k + 1) + 2 * m * k * k)
    nbytes = count * 4 * (3 * m * k + 4 * k * k)
    return Work("products", "tf32", 3 * flops, nbytes, steps=3)


def _lowrank_add(launch: Launch) -> Work:
    (m, n), (_, k) = launch.shapes[:2]
    return Work("products", "tf32", 3 * 2.0 * m * n * k, launch.nbytes)


def _kth_largest_magnitude(launch: Launch) -> Work:
    return Work("elementwise", nbytes=3 * launch.nbytes)  # three histograms


def _elect_merge(launch: Launch) -> Work:
    return Work("elementwise", nbytes=launch.nbytes)


def _etf_project(launch: Launch) -> Work:
    rows = launch.shapes[0][-2]
    return Work("elementwise", nbytes=launch.nbytes * (1 if rows <= 128 else 1.5))  # then it is read twice


# The kernels of dirmerge that merges launch.
KERNELS: dict[str, Callable[[Launch], Work]] = {
    "delta_sketch": _delta_sketch,
    "gram": _gram,
    "polar_step": _polar_step,
    "lowrank_add": _lowrank_add,
    "kth_largest_magnitude": _kth_largest_magnitude,
    "elect_merge": _elect_merge,
    "etf_project": _etf_project,
}


def _factorisation(launch: Launch) -> Work:
    """Prices what torch leaves to cuSOLVER and cuBLAS, without tensor cores; see MODEL."""
    *batch, m, n = launch.shapes[0]
    count, p, q = math.prod(batch), min(m, n), max(m, n)
    nbytes = float(launch.nbytes)
    if launch.op == "_linalg_eigh":
        flops, steps = 9.0 * n**3, n * (count if n > BATCHED else 1)
        nbytes += count * n**3 / 3 * launch.dtypes[0].itemsize
    elif launch.op == "_linalg_svd":
        flops = SWEEPS * 6.0 * p**3 + (4.0 * q * p**2 if q > p else 0.0)
        steps = SWEEPS * p * count if q > BATCHED else SWEEPS
    elif launch.op == "linalg_qr":
        flops, steps = 4.0 * m * p**2, -(-p // PANEL)
    elif launch.op == "linalg_cholesky_ex":
        flops, steps = n**3 / 3, -(-n // PANEL)
    elif launch.op == "linalg_solve_triangular":
        rows = math.prod(launch.shapes[1]) // max(count * n, 1)
        flops, steps = float(rows * n**2), -(-n // PANEL)
    else:
        raise ValueError(f"roofline: the factorisation {launch.op} has no model, add one")
    unit = "fp64" if launch.dtypes[0] == torch.float64 else "fp32"
    return Work("factorisations", unit, count * flops, nbytes, max(1, steps))


MODEL = f"""\
- A product that torch runs: FLOP at the rate of its dtype. float32 runs without tensor cores, which is
  torch's default; float64 runs on them.
- A kernel of dirmerge: one launch of the Triton or CUDA C++ kernel, float32 as three TF32 products (three of
  bfloat16 with random signs). The threshold reads its input three times.
- `eigh`: 9 n³ FLOP, n steps one after the other, n³/3 entries read for the reduction to tridiagonal form.
- `svd`: {SWEEPS} Jacobi sweeps of 6 n³ FLOP; a sweep has n steps, and one up to {BATCHED} columns.
- `eigh` and `svd` above {BATCHED} columns take the matrices of a batch one after the other, as torch does.
- `qr`, `cholesky`, triangular solve: 4 m n², n³/3, m n² FLOP, one step per {PANEL} columns, a batch at once.
  No factorisation uses tensor cores.
- All else: bytes alone.
- A launch takes the longest of its FLOP at the peak of their arithmetic, its bytes at the bandwidth of the
  memory, and {LAUNCH * 1e6:.0f} µs per step (an assumption: torch's eager mode from call to call).
- A wait of the host costs {SYNC * 1e6:.0f} µs (an assumption). In torch, `eigh` waits once, `svd` twice.
"""
# Reads of what a factorisation reports: errors, and before them the convergence of an SVD.
_WAITS = {"_linalg_eigh": 1, "_linalg_svd": 2}
_UNITS = {torch.float64: "matrix64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}


def work(launch: Launch) -> Work:
    """Returns what a launch has to do.

    Raises:
        ValueError: for a kernel of dirmerge or a factorisation that has no model.
    """
    if launch.op in KERNELS:
        return KERNELS[launch.op](launch)
    if launch.op in table.ops():
        raise ValueError(f"roofline: the kernel of {launch.op} has no model, add one to KERNELS")
    if launch.op == "linalg_solve_triangular" or launch.factorisation:
        return _factorisation(launch)
    if launch.flops:
        return Work("products", _UNITS[launch.dtypes[0]], launch.flops, launch.nbytes)
    return Work("elementwise", nbytes=launch.nbytes, steps=int("empty" not in launch.op))


@dataclass(frozen=True)
class Price:
    """The predicted seconds of one merge on one GPU.

    Attributes:
        products: of GEMMs and kernels with products.
        factorisations: of what a solver library does.
        elementwise: of all other launches.
        waits: of the host.
        bus_in: of the copies to the GPU.
        bus_out: of the copies to the host.
        limits: the seconds of the launches by what binds them: arithmetic, memory, steps.
    """

    products: float
    factorisations: float
    elementwise: float
    waits: float
    bus_in: float
    bus_out: float
    limits: dict[str, float]

    @property
    def computing(self) -> float:
        """Seconds of all launches and waits; copies overlap with those of other matrices."""
        return self.products + self.factorisations + self.elementwise + self.waits

    @property
    def bound(self) -> str:
        """The part that takes longest, and what binds most launches; bus where the copies take longer."""
        if max(self.bus_in, self.bus_out) > self.computing:
            return "bus"
        parts = ("products", "factorisations", "elementwise", "waits")
        part = max(parts, key=lambda name: float(getattr(self, name)))
        return f"{part}, {max(self.limits, key=lambda name: self.limits[name])}"


def waits_of(log: Log) -> int:
    """Returns the waits of the host: those of the program, and those inside torch's factorisations."""
    return log.syncs + sum(_WAITS.get(launch.op, 0) for launch in log.launches)


def price(log: Log, gpu: GPU) -> Price:
    """Prices a log launch by launch."""
    parts: Counter[str] = Counter()
    limits: Counter[str] = Counter()
    for launch in log.launches:
        needed = work(launch)
        seconds, binding = needed.seconds(gpu)
        parts[needed.part] += seconds  # type: ignore[assignment]
        limits[binding] += seconds  # type: ignore[assignment]
    return Price(
        parts["products"],
        parts["factorisations"],
        parts["elementwise"],
        SYNC * waits_of(log),
        log.bytes_in / gpu.bus,
        log.bytes_out / gpu.bus,
        dict(limits),
    )


def costly(log: Log, gpu: GPU, count: int = 3) -> list[dict[str, Any]]:
    """Returns the lines of dirmerge whose launches of one op take longest."""
    seconds: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    largest: dict[tuple[str, str], Launch] = {}
    for launch in log.launches:
        key = launch.where, launch.op
        seconds[key] += work(launch).seconds(gpu)[0]  # type: ignore[assignment]
        numbers[key] += 1
        if key not in largest or launch.nbytes > largest[key].nbytes:
            largest[key] = launch
    return [
        {
            "where": where,
            "op": op,
            "launches": numbers[where, op],
            "shapes": " · ".join("×".join(map(str, shape)) for shape in largest[where, op].shapes[:2]),
            "dtype": str(largest[where, op].dtypes[0]).removeprefix("torch."),
            "seconds": spent,
        }
        for (where, op), spent in seconds.most_common(count)
    ]


# The matrices of LLaMA-7B, and the MLP of a model of 1.1 B parameters.
SHAPES = (*((layer.m, layer.n) for layer in MODELS["llama7b"]), (5632, 2048))


def row(method: str, m: int, n: int, tasks: int, *, adapters: bool) -> dict[str, Any]:
    """Records one case and returns its figures."""
    log = record(method, m, n, tasks, adapters=adapters)
    launched = [launch for launch in log.launches if work(launch).steps]
    return {
        "method": method,
        "inputs": "adapters" if adapters else "full",
        "shape": [m, n],
        "tasks": tasks,
        "launches": len(launched),
        "waits": waits_of(log),
        "flops": sum(work(launch).flops for launch in log.launches),
        "bytes": sum(work(launch).nbytes for launch in log.launches),
        "bytes_in": log.bytes_in,
        "bytes_out": log.bytes_out,
        "peak_bytes": log.peak_bytes,
        "prices": {gpu.name: asdict(price(log, gpu)) for gpu in GPUS},
        "costly": costly(log, GPUS[1]),
    }


def program() -> str:
    """Returns the commit that last changed the package, and whether it has changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = " with changes that are not committed" if git("status", "--porcelain", "dirmerge") else ""
    return git("log", "-1", "--format=%h", "--", "dirmerge") + changed


def measure() -> dict[str, Any]:
    """Records every method at every shape, full fine-tunes and adapters."""
    rows = []
    for m, n in SHAPES:
        for adapters in (False, True):
            for method in sorted(METHODS):
                rows.append(row(method, m, n, TASKS, adapters=adapters))
                found = rows[-1]
                print(f"{method}, {found['inputs']}, {m} × {n}: {found['launches']} launches", flush=True)
    return {"program": program(), "rows": rows}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    marks = ["---"] * left + ["---:"] * (len(columns) - left)
    return [f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows)]


def _prices(found: dict[str, Any]) -> dict[str, Price]:
    return {name: Price(**values) for name, values in found["prices"].items()}


def _case(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of one shape and kind of inputs."""
    columns = ["method", "bound on H100", "launches", "waits", "TFLOP", "GB", "in MB", "out MB"]
    columns += ["products", "factorisations", "elementwise", "waiting", "arithmetic"]
    columns += [f"{gpu.name}, ms" for gpu in GPUS] + ["bus, ms"]
    lines = []
    for found in rows:
        prices = _prices(found)
        h100 = prices["H100"]
        cells = [found["method"], h100.bound, str(found["launches"]), str(found["waits"])]
        cells += [f"{found['flops'] / 1e12:.3g}", f"{found['bytes'] / 1e9:.3g}"]
        cells += [f"{found[key] / 1e6:.0f}" for key in ("bytes_in", "bytes_out")]
        parts = (h100.products, h100.factorisations, h100.elementwise, h100.waits)
        cells += [_ms(seconds) for seconds in parts]
        cells.append(f"{h100.limits.get('arithmetic', 0.0) / h100.computing:.0%}")
        cells += [_ms(prices[gpu.name].computing) for gpu in GPUS]
        lines.append([*cells, _ms(h100.bus_in)])
    return _table(columns, lines, 2)


def _costly(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        [
            found["method"],
            f"`{line['where']}`",
            line["op"],
            f"{line['shapes']} {line['dtype']}",
            str(line["launches"]),
            _ms(line["seconds"]),
            f"{line['seconds'] / _prices(found)['H100'].computing:.0%}",
        ]
        for found in rows
        for line in found["costly"]
    ]
    return _table(["method", "line", "op", "largest", "launches", "ms", "of all"], lines, 4)


def _whole_model(rows: Sequence[dict[str, Any]], inputs: str) -> list[str]:
    """The table of all matrices of LLaMA-7B."""
    lines = []
    for method in sorted({found["method"] for found in rows}):
        times, bus, read = Counter[str](), Counter[str](), 0.0
        for layer in MODELS["llama7b"]:
            key = (method, inputs, [layer.m, layer.n])
            found = next(r for r in rows if (r["method"], r["inputs"], r["shape"]) == key)
            count = BLOCKS["llama7b"] * layer.per_block
            entries = layer.m * layer.n
            own = ADAPTER_RANK * (layer.m + layer.n) if inputs == "adapters" else entries
            read += count * ITEMSIZE * (entries + TASKS * own)
            for name, one in _prices(found).items():
                times[name] += count * one.computing  # type: ignore[assignment]
                bus[name] += count * max(one.bus_in, one.bus_out)  # type: ignore[assignment]
        cells = [method, f"{read / FILE_BANDWIDTH:.3g}", f"{bus['H100']:.3g}"]
        cells += [f"{times[gpu.name]:.3g}" for gpu in GPUS]
        limits = {"files": read / FILE_BANDWIDTH, "bus": bus["H100"], "computing": times["H100"]}
        lines.append([*cells, max(limits, key=lambda name: limits[name])])
    columns = ["method", "files", "bus, H100", *(f"computing, {gpu.name}" for gpu in GPUS), "bound on H100"]
    return _table(columns, lines)


INTRODUCTION = f"""\
# Roofline: a prediction

**Nothing on this page ran on a GPU, and no time on it was measured.** It is what the program at commit
{{program}} launches on a GPU, priced by public peak figures. Real programs reach a part of the peaks.
Written by `python -m benchmarks.roofline` from roofline.json beside it.

The program is `dirmerge.merge` with default options, from bfloat16 files to a full model. It runs on the
tests' shadow GPU (tests/shadow), which notes every operation on the device with its shapes. It runs without
values: nothing is computed, so that the real shapes cost no time. Conditions that a device reads at the end
of a batch (full rank, finite values, convergence) are taken to hold, which is the usual case.

## How a launch is priced

{MODEL}
{SOURCES}
Not counted: the small kernels inside one torch operation. The column `factorisations` is the least certain:
its model is simple, and no solver library was measured.
"""
COLUMNS = """\
`launches` without allocations; `waits` of the host, those inside torch included; `TFLOP` of the units; `GB`
read and written in the GPU's memory; `in` and `out` over the bus. The parts are milliseconds on H100.
`arithmetic` is the share of the time in which FLOP bind. A card's column is the time of all launches and
waits. `bus` is copying in, on H100; in a long merge it overlaps with the computation of the matrix before.
`bound` names the longest part, and what binds most of the time: arithmetic, memory, or steps (one launch
after the other).
"""
WHOLE_MODEL = f"""\
## All matrices of LLaMA-7B, in seconds

The {BLOCKS["llama7b"]} blocks with their seven matrices each, one after the other on one GPU; embeddings and
norms are left out. Files are read at 7 GB/s (an assumption: one NVMe drive). Reading, copying and computing
overlap: the longest of the three is the time of the merge.
"""


def page(measured: dict[str, Any]) -> str:
    """Renders the page."""
    rows = measured["rows"]
    lines = [*INTRODUCTION.format(program=measured["program"]).splitlines(), ""]
    for m, n in SHAPES:
        for inputs in ("full", "adapters"):
            own = [found for found in rows if (found["shape"], found["inputs"]) == ([m, n], inputs)]
            kind = "full fine-tunes" if inputs == "full" else f"rank-{ADAPTER_RANK} adapters"
            lines += [f"## One matrix of {m} × {n}, {TASKS} {kind}", ""]
            if (m, n) == SHAPES[0] and inputs == "full":
                lines += [*COLUMNS.splitlines(), ""]
            lines += [*_case(own), ""]
            if (m, n) == SHAPES[0]:
                lines += ["Where the time goes on H100, three lines of dirmerge each:", "", *_costly(own), ""]
    lines += [*WHOLE_MODEL.splitlines(), ""]
    for inputs, kind in (("full", "full fine-tunes"), ("adapters", f"rank-{ADAPTER_RANK} adapters")):
        lines += [f"### {TASKS} {kind}", "", *_whole_model(rows, inputs), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Records every case and writes the figures and the page."""
    measured = measure()
    RESULTS.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(measured))


if __name__ == "__main__":
    main()
