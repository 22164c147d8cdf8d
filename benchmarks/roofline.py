"""Predicts on paper what the kernels and whole merges would cost on GPUs: benchmarks/results/roofline.md.

    python -m benchmarks.roofline

Nothing is measured: FLOPs and bytes are counted from the shapes, and divided by public peak figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import ADAPTER_RANK, BLOCKS, MODELS, TASKS, Layer

PAGE = Path(__file__).parent / "results" / "roofline.md"
OVERSAMPLING = 16
POWER_ITERATIONS = 2
POLAR_STEPS = 8
WEIGHT_BYTES = 2
# A local NVMe drive's sequential reading, an assumption: what stands before a checkpoint is seldom faster.
FILE_BANDWIDTH = 7e9


@dataclass(frozen=True)
class GPU:
    """Peak figures of one GPU: dense FLOP/s without sparsity by arithmetic, bytes/s of its memory and bus."""

    name: str
    flops: dict[str, float]
    memory: float
    bus: float


GPUS = (
    GPU("A100 SXM 80 GB", {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 2.039e12, 32e9),
    GPU("H100 SXM", {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12}, 3.35e12, 64e9),
    GPU("H200 SXM", {"bf16": 989e12, "tf32": 494.5e12, "fp32": 67e12}, 4.8e12, 64e9),
)
SOURCES = """\
| figure | A100 SXM 80 GB | H100 SXM | H200 SXM | source |
|---|---:|---:|---:|---|
| BF16, dense | 312 TFLOP/s | 989 TFLOP/s | 989 TFLOP/s | NVIDIA data sheets of A100, H100 and H200; \
those of the last two print 1,979 with sparsity, which is half that dense |
| TF32, dense | 156 TFLOP/s | 494.5 TFLOP/s | 494.5 TFLOP/s | the same; 989 with sparsity |
| FP32, no tensor cores | 19.5 TFLOP/s | 67 TFLOP/s | 67 TFLOP/s | the same |
| memory | 2.039 TB/s | 3.35 TB/s | 4.8 TB/s | the same |
| PCIe, one direction | 32 GB/s | 64 GB/s | 64 GB/s | the same: gen 4 and gen 5, 64 and 128 GB/s both ways |
| files | 7 GB/s | 7 GB/s | 7 GB/s | an assumption: one NVMe drive |
"""


@dataclass(frozen=True)
class Cost:
    """What a kernel or stage does.

    Attributes:
        flops: multiplications and additions of the method, by the arithmetic they run in.
        passes: how many products of that arithmetic make one of the method: three of TF32 or bfloat16
            for a float32 product, two where one operand is the sum of two bfloat16 matrices.
        bytes: every input read and every output written once per kernel.
    """

    flops: dict[str, float]
    passes: dict[str, int]
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other; their passes are multiplied out first."""
        units = {*self.flops, *other.flops}
        work = {unit: self.work(unit) + other.work(unit) for unit in units}
        return Cost(work, dict.fromkeys(units, 1), self.bytes + other.bytes)

    def times(self, count: float) -> Cost:
        """The same several times."""
        flops = {unit: count * value for unit, value in self.flops.items()}
        return Cost(flops, self.passes, count * self.bytes)

    def work(self, unit: str) -> float:
        """FLOPs that the unit has to do."""
        return self.flops.get(unit, 0.0) * self.passes.get(unit, 1)

    def intensity(self) -> float:
        """FLOPs of the units per byte."""
        return sum(self.work(unit) for unit in self.flops) / self.bytes

    def seconds(self, gpu: GPU) -> tuple[float, str]:
        """The longer of computing and moving at peak, and which it is."""
        limits = {"memory": self.bytes / gpu.memory}
        limits |= {unit: self.work(unit) / gpu.flops[unit] for unit in self.flops}
        binding = max(limits, key=lambda name: limits[name])
        return limits[binding], binding


def delta_sketch(m: int, n: int, width: int, T: int, *, given: bool = False) -> Cost:
    """(W_t − W_0) Ω for T tasks; given: a test matrix per task is read.

    Products with a random Ω are three of bfloat16 each, with a given one three of TF32.
    """
    unit = "tf32" if given else "bf16"
    moved = WEIGHT_BYTES * (T + 1) * m * n + 4 * T * width * (m + (n if given else 0))
    return Cost({unit: 2.0 * T * m * n * width}, {unit: 3}, moved)


def gram(m: int, n: int, batch: int = 1, itemsize: int = 4) -> Cost:
    """XᵀX, upper triangle, float32 as three TF32 products, 16-bit as they are."""
    unit, passes = ("tf32", 3) if itemsize == 4 else ("bf16", 1)
    return Cost(
        {unit: float(batch * m * n * (n + 1))}, {unit: passes}, batch * (itemsize * m * n + 4 * n * n)
    )


def polar_step(m: int, k: int, batch: int = 1) -> Cost:
    """One step on float32: Gram matrix, the polynomial's upper triangle, the product; three TF32 each."""
    polynomial = Cost({"tf32": float(batch * k * k * (k + 1))}, {"tf32": 3}, batch * 8 * k * k)
    apply = Cost({"tf32": 2.0 * batch * m * k * k}, {"tf32": 3}, batch * 4 * (2 * m * k + k * k))
    return gram(m, k, batch) + polynomial + apply


def product(m: int, k: int, n: int, batch: int = 1) -> Cost:
    """A float32 GEMM to float32 accuracy."""
    return Cost({"tf32": 2.0 * batch * m * k * n}, {"tf32": 3}, 4.0 * batch * (m * k + k * n + m * n))


def kth_largest_magnitude(K: int, T: int) -> Cost:
    """Three histogram passes over T float32 matrices."""
    return Cost({}, {}, 3 * 4 * T * K * K)


def elect_merge(entries: int, T: int) -> Cost:
    """One read of T float32 inputs and one write; about ten operations an entry."""
    return Cost({"fp32": 10.0 * T * entries}, {}, 4 * (T + 1) * entries)


def etf_project(K: int, n: int) -> Cost:
    """A read and a write of the core, three additions an entry; above 128 rows it is read twice."""
    return Cost({"fp32": 3.0 * K * n}, {}, 4 * K * n * (2 if K <= 128 else 3))


def lowrank_add(m: int, n: int, k: int) -> Cost:
    """W_0 + λ L Rᵀ, float32 factors as three TF32 products, W_0 read once, the result written once."""
    return Cost({"tf32": 2.0 * m * n * k}, {"tf32": 3}, 2 * WEIGHT_BYTES * m * n + 4 * k * (m + n))


def small_svd(n: int, batch: int) -> Cost:
    """Batched SVD of n × n by the library: counted as eight Jacobi sweeps of 6 n³ FLOPs in float32."""
    return Cost({"fp32": 8 * 6.0 * batch * n**3}, {}, 4 * batch * 3 * n * n)


def rotation_step(d: int, T: int) -> Cost:
    """Two products, the fused skew step, eight polar steps and the deviation."""
    skew = Cost({"fp32": 4.0 * T * d * d}, {}, 12 * T * d * d)
    return product(d, d, d, 2 * T) + skew + polar_step(d, d, T).times(8) + gram(d, d, T)


def cholesky_qr2(m: int, k: int, batch: int) -> Cost:
    """Two rounds of Gram matrix, Cholesky (k³/3) and triangular solve (m k²)."""
    chol = Cost({"fp32": batch * k**3 / 3}, {}, 8 * batch * k * k)
    solve = Cost({"tf32": float(batch * m * k * k)}, {"tf32": 3}, 4 * batch * (2 * m * k + k * k))
    return (gram(m, k, batch) + chol + solve).times(2)


def eigh(k: int, batch: int) -> Cost:
    """Symmetric eigenproblem by the library, 9 k³ in float32, half of it bound by memory in any library."""
    return Cost({"fp32": 9.0 * batch * k**3}, {}, 4 * batch * 3 * k * k)


def kernels(layer: Layer) -> list[tuple[str, str, Cost]]:
    """Every kernel at the sizes that eight full fine-tunes of a layer give it: op, form, cost."""
    m, n, p = layer.m, layer.n, min(layer.m, layer.n)
    width, K = p // TASKS + OVERSAMPLING, p // TASKS * TASKS
    return [
        ("delta_sketch", f"random, width {width}", delta_sketch(m, n, width, TASKS)),
        ("delta_sketch", f"given, width {width}", delta_sketch(m, n, width, TASKS, given=True)),
        ("gram", f"{TASKS} × {m}×{width}, float32", gram(m, width, TASKS)),
        ("gram", f"{m}×{K}, bfloat16", gram(m, K, itemsize=2)),
        ("polar_step", f"{m}×{K}, float32", polar_step(m, K)),
        ("kth_largest_magnitude", f"{TASKS} × {K}×{K}", kth_largest_magnitude(K, TASKS)),
        ("elect_merge", f"{TASKS} × {K}×{K}", elect_merge(K * K, TASKS)),
        ("etf_project", f"{K}×{K}", etf_project(K, K)),
        ("lowrank_add", f"rank {TASKS * ADAPTER_RANK}", lowrank_add(m, n, TASKS * ADAPTER_RANK)),
        ("lowrank_add", f"rank {K}", lowrank_add(m, n, K)),
        ("rotation_step", f"{TASKS} × {n}×{n}", rotation_step(n, TASKS)),
    ]


def read_bytes(layer: Layer, *, adapters: bool) -> tuple[float, float]:
    """Bytes of a layer's base and of its tasks, as they lie in files."""
    base = float(WEIGHT_BYTES * layer.m * layer.n)
    tasks = WEIGHT_BYTES * TASKS * ADAPTER_RANK * (layer.m + layer.n) if adapters else TASKS * base
    return base, tasks


def stages(layer: Layer, *, dc_merge: bool, adapters: bool) -> list[tuple[str, Cost]]:
    """What one layer's merge computes: DC-Merge or TSV-M, full fine-tunes of rank p/8 or rank-16 adapters."""
    m, n, p, T = layer.m, layer.n, min(layer.m, layer.n), TASKS
    r = ADAPTER_RANK if adapters else p // T
    K = T * r
    if adapters:
        decomposition = [
            ("thin QRs", cholesky_qr2(m, r, T) + cholesky_qr2(n, r, T)),
            ("small SVDs", small_svd(r, T) + product(m, r, r, T) + product(n, r, r, T)),
        ]
    else:
        s = r + OVERSAMPLING
        # Z = DᵀQ and Y = D Z.
        once = delta_sketch(n, m, s, T, given=True) + delta_sketch(m, n, s, T, given=True)
        once += cholesky_qr2(n, s, T) + cholesky_qr2(m, s, T)
        last = delta_sketch(n, m, s, T, given=True) + gram(n, s, T) + eigh(s, T)
        decomposition = [
            ("sketch", delta_sketch(m, n, s, T) + cholesky_qr2(m, s, T)),
            (f"{POWER_ITERATIONS} power iterations", once.times(POWER_ITERATIONS)),
            ("last pass, small SVDs", last + product(m, s, r, T) + product(n, s, r, T)),
        ]
    # On the Gram matrix where the stacked bases are tall: K × K steps, and one product at the end.
    cover = Cost({}, {}, 0)
    for size in (m, n):
        if size >= 2 * K:
            cover += gram(size, K) + polar_step(K, K).times(POLAR_STEPS) + product(size, K, K)
        else:
            cover += polar_step(size, K).times(POLAR_STEPS)
    found = [*decomposition, (f"cover spaces, {POLAR_STEPS} polar steps", cover)]
    if dc_merge:
        # C_uᵀU and C_vᵀV once, then per task (K × r)(r × K); each coordinate matrix is written once.
        coordinates = product(K, m, K) + product(K, n, K) + product(K, r, K, T)
        found += [
            ("coordinates", coordinates),
            ("threshold, election", kth_largest_magnitude(K, T) + elect_merge(T * r * r, T)),
        ]
        # The block diagonal core goes into the left side: T products (m × r)(r × r).
        found.append(("apply", product(m, r, r, T) + lowrank_add(m, n, K)))
    else:
        scaling = Cost({"fp32": float(m * K)}, {}, 8 * m * K)
        found.append(("apply", scaling + lowrank_add(m, n, K)))
    return found


def merge(family: str, *, dc_merge: bool, adapters: bool) -> list[tuple[str, Cost]]:
    """The stages of a whole model: every layer of every block."""
    total: dict[str, Cost] = {}
    for layer in MODELS[family]:
        for name, cost in stages(layer, dc_merge=dc_merge, adapters=adapters):
            cost = cost.times(BLOCKS[family] * layer.per_block)
            total[name] = total[name] + cost if name in total else cost
    return list(total.items())


def model_bytes(family: str, *, adapters: bool) -> tuple[float, float]:
    """Bytes of a model's matrices, of the base and of the tasks."""
    pairs = [
        [BLOCKS[family] * layer.per_block * size for size in read_bytes(layer, adapters=adapters)]
        for layer in MODELS[family]
    ]
    return sum(base for base, _ in pairs), sum(tasks for _, tasks in pairs)


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def _count(value: float) -> str:
    if not value:
        return "–"
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor or unit == "M":
            return f"{value / factor:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def _row(name: Sequence[str], cost: Cost) -> str:
    flops = sum(cost.work(unit) for unit in cost.flops)
    found = [cost.seconds(gpu) for gpu in GPUS]
    limits = list(dict.fromkeys(limit for _, limit in found))
    cells = [*name, _count(flops), f"{_count(cost.bytes)}B", f"{cost.intensity():.3g}", ", ".join(limits)]
    return f"| {' | '.join([*cells, *(_time(seconds) for seconds, _ in found)])} |"


def _header(first: Iterable[str]) -> list[str]:
    columns = [*first, "FLOP", "bytes", "FLOP/byte", "limit", *(gpu.name for gpu in GPUS)]
    marks = ["---"] * len(list(first)) + ["---:"] * 3 + ["---"] + ["---:"] * len(GPUS)
    return [f"| {' | '.join(cells)} |" for cells in (columns, marks)]


def _whole_model(family: str, *, dc_merge: bool, adapters: bool) -> list[str]:
    base, tasks = model_bytes(family, adapters=adapters)
    found = merge(family, dc_merge=dc_merge, adapters=adapters)
    method = "DC-Merge" if dc_merge else "TSV-M"
    kind = f"rank-{ADAPTER_RANK} adapters" if adapters else f"full fine-tunes, r = p/{TASKS}"
    lines = [f"### {method}, {TASKS} {kind}", "", *_header(["stage"])]
    reading, sending = (base + tasks) / FILE_BANDWIDTH, [(base + tasks) / gpu.bus for gpu in GPUS]
    moved = f"| – | {_count(base + tasks)}B | – |"
    lines.append(f"| read from files {moved} files | {' | '.join([_time(reading)] * len(GPUS))} |")
    lines.append(f"| send to the GPU {moved} PCIe | {' | '.join(map(_time, sending))} |")
    lines += [_row([name], cost) for name, cost in found]
    computed = [sum(cost.seconds(gpu)[0] for _, cost in found) for gpu in GPUS]
    total = [max(reading, bus, time) for bus, time in zip(sending, computed, strict=True)]
    lines.append(f"| all computing | | | | | {' | '.join(map(_time, computed))} |")
    lines.append(f"| all, reading and computing at once | | | | | {' | '.join(map(_time, total))} |")
    return [*lines, ""]


def page() -> str:
    """Renders the page."""
    lines = [
        "# Roofline: a prediction",
        "",
        "**A prediction from public peak figures. Nothing on this page was measured, and no kernel of this",
        "project has been timed on a GPU.** Written by `python -m benchmarks.roofline` from",
        "benchmarks/shapes.py; real kernels reach a part of the peaks, matrix kernels usually half to three",
        "quarters.",
        "",
        "FLOP are those of the units: a product to float32 accuracy is three of TF32, or three of bfloat16",
        "with random signs, so it counts three times; bytes count every input and output of a kernel once.",
        "The time is the longest of bytes over memory bandwidth and FLOP over the peak of each kind of",
        "arithmetic; `limit` says which it is (one word per GPU where they differ, in the order of columns).",
        "",
        *SOURCES.splitlines(),
        "",
        f"T = {TASKS} tasks in bfloat16; sketches of p/{TASKS} + {OVERSAMPLING} columns.",
        "",
    ]
    for family in ("vit-l", "llama7b"):
        name = {"vit-l": "ViT-L", "llama7b": "LLaMA-7B"}[family]
        for layer in MODELS[family]:
            lines += [f"## {name}, {layer.name} {layer.m} × {layer.n}", "", *_header(["op", "form"])]
            lines += [_row([op, form], cost) for op, form, cost in kernels(layer)]
            lines.append("")
    lines += [
        "## A whole model of 7B, stage by stage",
        "",
        f"The {BLOCKS['llama7b']} blocks of LLaMA-7B, their seven matrices each; embeddings and norms are",
        f"left out. {POWER_ITERATIONS} power iterations and a last pass, both cover spaces by polar steps,",
        "all to float32 accuracy. A stage counts as if FLOP and bytes of its kernels overlapped.",
        "",
    ]
    for adapters in (False, True):
        for dc_merge in (True, False):
            lines += _whole_model("llama7b", dc_merge=dc_merge, adapters=adapters)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
