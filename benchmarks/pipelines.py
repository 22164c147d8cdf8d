"""Whole pipelines, measured side by side: adapters against the dense form, files to files, peak memory.

    python -m benchmarks.pipelines adapters        DC-Merge of eight rank-16 adapters of one matrix
    python -m benchmarks.pipelines seven-billion   eight adapters of 7B shape, file to file
    python -m benchmarks.pipelines memory          full fine-tunes of 4 and of 16 layers
    python -m benchmarks.pipelines full            DC-Merge of eight full fine-tunes of one matrix

Each part keeps the results of the others in benchmarks/results/pipelines.json; `python -m benchmarks.report`
renders the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dirmerge
from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter

RESULTS = Path(__file__).parent / "results" / "pipelines.json"
N_TASKS, RANK = 8, 16


def machine() -> str:
    """Returns one line about this machine."""
    model, threads = platform.processor(), torch.get_num_threads()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, torch {torch.__version__} with {threads} "
        f"thread{'' if threads == 1 else 's'}"
    )


def dc_merge_dense(
    deltas: list[Tensor], rank: int, *, is_averaged: bool, width: int
) -> tuple[Tensor, list[float]]:
    """DC-Merge on dense deltas as published: T full SVDs, then one per cover space; and the energies kept.

    is_averaged: average smoothing, as for adapters; width: d, of whose square the filter keeps 0.001.
    """
    us, ss, vs, energies = [], [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :rank])
        ss.append(s[:rank].mean().expand(rank) if is_averaged else s[:rank])
        vs.append(vh[:rank].mT)
        energies.append(float(s[:rank].double().square().sum() / s.double().square().sum()))
    frames = []
    for bases in (us, vs):
        u, _, vh = torch.linalg.svd(torch.cat(bases, 1), full_matrices=False)
        frames.append(u @ vh)
    left, right = frames
    coordinates = []
    for u, s, v in zip(us, ss, vs, strict=True):
        c = left.mT @ ((u * s) @ v.mT) @ right
        threshold = c.abs().flatten().topk(max(1, int(1e-3 * width * width))).values.min()
        coordinates.append(torch.where(c.abs() >= threshold, c, torch.zeros_like(c)))
    stack = torch.stack(coordinates)
    total = stack.sum(0)
    chosen = (stack.sign() == total.sign()) & (stack != 0)
    mean = (stack * chosen).sum(0) / chosen.sum(0).clamp(min=1)
    mask = torch.block_diag(*[torch.ones(rank, rank)] * len(deltas))
    return left @ (mean * mask) @ right.mT, energies


def timed(function: Callable[[], object], runs: int) -> float:
    """Returns the median seconds of some runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def adapters(sizes: list[int]) -> list[dict[str, Any]]:
    """Times DC-Merge on factors against its dense form, the same result asserted first."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        loras = [
            dirmerge.LowRank.from_lora(
                torch.randn(size, RANK, generator=generator),
                torch.randn(RANK, size, generator=generator) / size,
            )
            for _ in range(N_TASKS)
        ]
        dense = [lora.dense() for lora in loras]
        start = time.perf_counter()
        expected, _ = dc_merge_dense(dense, RANK, is_averaged=True, width=N_TASKS * RANK)
        slow = time.perf_counter() - start
        merged = dirmerge.merge_deltas(loras, "dc_merge")
        error = float((merged.dense() - expected).norm() / expected.norm())
        if error > 1e-5:
            raise SystemExit(f"the factored and the dense result differ by {error:.1e} at {size}")
        fast = timed(partial(dirmerge.merge_deltas, loras, "dc_merge"), 21)
        rows.append({"size": size, "dense_s": slow, "factored_s": fast, "ratio": slow / fast, "error": error})
        print(
            f"{size} x {size}: dense {slow:.2f} s, factored {fast * 1e3:.1f} ms, "
            f"ratio {slow / fast:.0f}, error {error:.1e}"
        )
    return rows


# A head of 64 singular values falling as i^(−0.7) with three quarters of the energy, on the flat bulk of a
# Gaussian matrix: as much in the leading eighth of the directions (0.84) as in the real fine-tunes.
HEAD, HEAD_ENERGY = 64, 0.75


def fine_tune_delta(size: int, generator: torch.Generator) -> Tensor:
    """Returns a random matrix of norm 1 with the spectrum of a fine-tuning delta."""
    u, v = (torch.linalg.qr(torch.randn(size, HEAD, generator=generator)).Q for _ in range(2))
    s = torch.arange(1, HEAD + 1) ** -0.7
    s *= (HEAD_ENERGY / s.square().sum()).sqrt()
    bulk = torch.randn(size, size, generator=generator)
    return (u * s) @ v.mT + bulk * ((1 - HEAD_ENERGY) ** 0.5 / bulk.norm())


def full(sizes: list[int]) -> list[dict[str, Any]]:
    """Times DC-Merge of full fine-tunes, randomized and exact, against its dense form."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        deltas = [fine_tune_delta(size, generator) for _ in range(N_TASKS)]
        row: dict[str, Any] = {"size": size, "tasks": N_TASKS, "rank": size // N_TASKS}
        times: dict[str, list[float]] = {"dense": [], "exact": [], "randomized": []}
        for repetition in range(3):
            start = time.perf_counter()
            expected, best = dc_merge_dense(deltas, size // N_TASKS, is_averaged=False, width=size)
            times["dense"].append(time.perf_counter() - start)
            for svd in ("exact", "randomized"):
                start = time.perf_counter()
                merged = dirmerge.merge_deltas(deltas, "dc_merge", svd=svd)
                times[svd].append(time.perf_counter() - start)
                if repetition:
                    continue
                value, truth = merged.dense().double().flatten(), expected.double().flatten()
                row[f"{svd}_cosine"] = float(value @ truth / (value.norm() * truth.norm()))
                row[f"{svd}_energy"] = min(
                    own / most for own, most in zip(merged.record.energy, best, strict=True)
                )
                row[f"{svd}_notes"] = merged.record.notes + merged.record.fallbacks
                if row[f"{svd}_energy"] < 0.99 or (svd == "exact" and row["exact_cosine"] < 0.999):
                    raise SystemExit(f"{svd} at {size} is not the dense result: {row}")
            del expected
            print(f"{size} x {size}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items()))
        for name, seconds in times.items():
            row[f"{name}_s"] = statistics.median(seconds)
        # Power iterations in bfloat16 would need this to be well below 1.
        test = torch.randn(size, size // N_TASKS + 16, generator=generator)
        passes = []
        for dtype in (torch.bfloat16, torch.float32):
            a, x = deltas[0].to(dtype), test.to(dtype)
            passes.append(timed(lambda a=a, x=x: a @ x, 7))  # type: ignore[misc]
        row["bfloat16_pass"] = passes[0] / passes[1]
        rows.append(row)
        print(row)
    return rows


def run_measured(arguments: list[str]) -> tuple[float, float]:
    """Runs `dirmerge …` in a process of its own; returns seconds and peak resident megabytes (10⁶ bytes)."""
    start = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-m", "dirmerge", *arguments], dict(os.environ))
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"dirmerge {' '.join(arguments)} failed")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int, std: float
) -> None:
    """Writes random tensors one after the other, so that making the data needs little memory too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    entries = [(name, dtype, shape) for name, shape in shapes.items()]
    with SafetensorsFileWriter(path, entries, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            writer.write(name, (torch.randn(shape, generator=generator) * std).to(dtype))


PROJECTIONS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def seven_billion(workdir: Path) -> list[dict[str, Any]]:
    """Merges eight rank-16 adapters of LLaMA-7B's shapes into one adapter, file to file."""
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False,
        "target_modules": sorted({name.split(".")[-1] for name in PROJECTIONS}),
        "base_model_name_or_path": "synthetic-7b", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        size = 0
        for t in range(N_TASKS):
            folder = workdir / f"{label}-{t}"
            shapes: dict[str, tuple[int, ...]] = {}
            for layer in range(32):
                for module, (m, n) in PROJECTIONS.items():
                    prefix = f"base_model.model.model.layers.{layer}.{module}"
                    shapes[f"{prefix}.lora_A.weight"] = (RANK, n)
                    shapes[f"{prefix}.lora_B.weight"] = (m, RANK)
            write_file(folder / "adapter_model.safetensors", shapes, dtype, t, 0.01)
            (folder / "adapter_config.json").write_text(json.dumps(config))
            size += (folder / "adapter_model.safetensors").stat().st_size
        recipe = workdir / f"{label}.yml"
        models = "".join(f"  - model: {workdir}/{label}-{t}\n" for t in range(N_TASKS))
        recipe.write_text(f"merge_method: dc_merge\nmodels:\n{models}")
        out = workdir / f"{label}-out"
        seconds, peak = run_measured(["merge", str(recipe), "--out", str(out), "--as", "adapter"])
        written = sum(p.stat().st_size for p in out.iterdir())
        rows.append(
            {
                "dtype": label,
                "read_gb": size / 1e9,
                "written_gb": written / 1e9,
                "seconds": seconds,
                "peak_mb": peak,
            }
        )
        print(
            f"{label}: {size / 1e9:.2f} GB in, {written / 1e9:.2f} GB out, "
            f"{seconds:.1f} s, peak {peak:.0f} MB"
        )
        for path in workdir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rows


def memory(workdir: Path) -> list[dict[str, Any]]:
    """Merges full fine-tunes of 4 and of 16 layers, whose peaks must not differ, and one large matrix."""
    rows: list[dict[str, Any]] = []
    cases = [(method, 1280, 4, layers) for method in ("dc_merge", "tsv_m", "ties") for layers in (4, 16)]
    for method, width, n_tasks, layers in [*cases, ("dc_merge", 4096, 8, 1), ("ties", 4096, 8, 1)]:
        bound = 1000 + (n_tasks + 6) * width * width * 4 / 1e6
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(layers):
            shapes[f"model.layers.{layer}.up_proj.weight"] = (width, width)
            shapes[f"model.layers.{layer}.norm.weight"] = (width,)
        for t in range(n_tasks + 1):
            folder = workdir / f"{layers}-{t}"
            if not folder.exists():
                write_file(folder / "model.safetensors", shapes, torch.bfloat16, t, 0.02)
                (folder / "config.json").write_text("{}")
        recipe = workdir / f"{method}-{layers}.yml"
        models = "".join(f"  - model: {workdir}/{layers}-{t + 1}\n" for t in range(n_tasks))
        recipe.write_text(f"merge_method: {method}\nbase_model: {workdir}/{layers}-0\nmodels:\n{models}")
        seconds, peak = run_measured(["merge", str(recipe), "--out", str(workdir / "out"), "--overwrite"])
        rows.append(
                {"method": method, "layers": layers, "tasks": n_tasks, "width": width, "seconds": seconds,
                 "peak_mb": peak, "bound_mb": bound}
            )  # fmt: skip
        print(
            f"{method}, {n_tasks} tasks of {width}, {layers} layers: peak {peak:.0f} MB "
            f"(bound {bound:.0f} MB), {seconds:.1f} s"
        )
    return rows


def report(results: dict[str, Any]) -> str:
    """Renders the page."""
    lines = [
        "# Pipelines",
        "",
        "Written by `python -m benchmarks.pipelines`.",
        "",
    ]

    def table(part: str, title: str, header: str, rows: list[str]) -> None:
        where = f"On {results['machines'][part]}."
        lines.extend([f"## {title}", "", where, "", header, re.sub(r"[^|]+", "---", header), *rows, ""])

    if "adapters" in results:
        table(
            "adapters",
            "DC-Merge of eight rank-16 adapters of one matrix: factored against dense (T + 2 full SVDs)",
            "| matrix | dense | factored (median of 21) | ratio | relative difference |",
            [
                f"| {r['size']} × {r['size']} | {r['dense_s']:.1f} s | {r['factored_s'] * 1e3:.1f} ms "
                f"| {r['ratio']:.0f} | {r['error']:.1e} |"
                for r in results["adapters"]
            ],
        )
    if "full" in results:
        table(
            "full",
            "DC-Merge of eight full fine-tunes of one matrix, r = p/8, against its dense form (T + 2 full "
            "SVDs); medians of three",
            "| matrix | dense | exact | ratio | cosine | randomized | ratio | energy, of the best | cosine |",
            [
                f"| {r['size']} × {r['size']} | {r['dense_s']:.1f} s | {r['exact_s']:.1f} s "
                f"| {r['dense_s'] / r['exact_s']:.1f} | {r['exact_cosine']:.5f} | {r['randomized_s']:.1f} s "
                f"| {r['dense_s'] / r['randomized_s']:.1f} | {r['randomized_energy']:.4f} "
                f"| {r['randomized_cosine']:.3f} |"
                for r in results["full"]
            ],
        )
        lines[-1:] = [
            "",
            "A product with the test matrix in bfloat16 takes "
            + ", ".join(f"{r['bfloat16_pass']:.2f} ({r['size']})" for r in results["full"])
            + " times as long as in float32 on this machine: power iterations stay in float32.",
            "",
        ]
    if "seven-billion" in results:
        table(
            "seven-billion",
            "Eight rank-16 adapters of 7B shape (32 layers, 7 matrices each) into one, file to file",
            "| dtype | read | written | seconds | peak resident memory |",
            [
                f"| {r['dtype']} | {r['read_gb']:.2f} GB | {r['written_gb']:.2f} GB | {r['seconds']:.1f} "
                f"| {r['peak_mb']:.0f} MB |"
                for r in results["seven-billion"]
            ],
        )
    if "memory" in results:
        table(
            "memory",
            "Full fine-tunes: peak resident memory, bound 1 GB + (T + 6) × the largest tensor in float32",
            "| method | tasks | largest tensor | layers | peak | bound |",
            [
                f"| {r['method']} | {r['tasks']} | {r['width']} × {r['width']} | {r['layers']} "
                f"| {r['peak_mb']:.0f} MB | {r['bound_mb']:.0f} MB |"
                for r in results["memory"]
            ],
        )
    return "\n".join(lines)


def main() -> None:
    """Runs one part and keeps its result beside those of the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["adapters", "full", "seven-billion", "memory"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument(
        "--workdir", type=Path, help="where the synthetic checkpoints go; default a temporary folder"
    )
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.part in ("adapters", "full"):
        measured = adapters(arguments.sizes) if arguments.part == "adapters" else full(arguments.sizes)
        results[arguments.part] = measured
    else:
        with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
            part = seven_billion if arguments.part == "seven-billion" else memory
            results[arguments.part] = part(Path(folder))
    results.setdefault("machines", {})[arguments.part] = machine()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("python -m benchmarks.report renders the page")


if __name__ == "__main__":
    main()
