"""Whether svd="auto" chooses well: every form of the truncated SVD side by side, and the rates it predicts by.

    python -m benchmarks.svd_choice rates          measures the constants of dirmerge/linalg/cost.py
    python -m benchmarks.svd_choice grid           the cells of the page; resumed cell by cell
    python -m benchmarks.svd_choice grid --quick   small matrices, in a minute
    python -m benchmarks.svd_choice merges         DC-Merge with auto against its dense form
    python -m benchmarks.svd_choice table          prints what was measured

Times are medians in seconds of wall time and of CPU time of the process; the forms take turns. A form that is
not correct stops the run before its time is kept. Results: benchmarks/results/svd_choice.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dirmerge
from benchmarks.pipelines import HEAD, HEAD_ENERGY, dc_merge_dense, machine
from dirmerge.linalg import svd_truncated
from dirmerge.linalg._common import orthonormal

RESULTS = Path(__file__).parent / "results" / "svd_choice.json"
SHAPES = ((1024, 1024), (2048, 2048), (5632, 2048), (4096, 4096))
QUICK = ((256, 256), (512, 512))
TASKS = (2, 3, 4, 8)
SPECTRA = ("flat", "headed")
# A form that takes longer is called once.
ONCE_FROM_S = 20.0
# A predicted choice may cost this much more than the best form.
ALLOWED = 1.10


def matrix(m: int, n: int, spectrum: str, seed: int = 0) -> Tensor:
    """Returns a Gaussian matrix of norm 1, "headed" with the leading directions of a fine-tuning delta."""
    generator = torch.Generator().manual_seed(m + n + seed)
    bulk = torch.randn(m, n, generator=generator)
    if spectrum == "flat":
        return bulk / bulk.norm()
    u, v = (torch.linalg.qr(torch.randn(size, HEAD, generator=generator)).Q for size in (m, n))
    s = torch.arange(1, HEAD + 1) ** -0.7
    s *= (HEAD_ENERGY / s.square().sum()).sqrt()
    return (u * s) @ v.mT + bulk * ((1 - HEAD_ENERGY) ** 0.5 / bulk.norm())


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Returns the wall time, the CPU time of the process, and the result of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def alternate(forms: dict[str, Callable[[], Any]], check: Callable[[str, Any], None], runs: int) -> Any:
    """Times forms in turns, each result checked first; returns medians as {form: {"wall_s", "cpu_s"}}."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(runs):
        for name, form in forms.items():
            if times[name] and times[name][0][0] > ONCE_FROM_S:
                continue
            wall, cpu, result = timed(form)
            check(name, result)
            del result
            times[name].append((wall, cpu))
    return {
        name: {
            "wall_s": statistics.median(wall for wall, _ in found),
            "cpu_s": statistics.median(cpu for _, cpu in found),
            "runs": len(found),
        }
        for name, found in times.items()
    }


def rates(sizes: tuple[int, ...]) -> None:
    """Prints each stage's time relative to a float32 GEMM of the same size, as dirmerge/linalg/cost.py has it."""
    print(f"{machine()}, {time.strftime('%Y-%m')}")
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        a = torch.randn(n, n, generator=generator)
        tall, thin = (torch.randn(*shape, generator=generator) for shape in ((2 * n, n), (n, n // 4)))
        gram, double = a.mT @ a, a.double()
        stages: dict[str, tuple[Callable[[], Any], float]] = {
            "gemm": (lambda a=a: a @ a, 1.0),
            "thin gemm": (lambda a=a, y=thin: a @ y, 0.25),
            "gram": (lambda a=a: dirmerge.ops.gram(a), 1.0),
            "gram, float64": (lambda a=double: dirmerge.ops.gram(a), 1.0),
            "orthonormal": (lambda y=thin: orthonormal(y), 1 / 16),
            "eigh": (lambda g=gram: torch.linalg.eigh(g), 1.0),
            "svd": (lambda a=a: torch.linalg.svd(a, full_matrices=False), 1.0),
            "svd of twice the rows": (lambda a=tall: torch.linalg.svd(a, full_matrices=False), 1.0),
        }
        found = alternate(
            {name: stage for name, (stage, _) in stages.items()}, lambda name, result: None, 3 if n > 1024 else 7
        )
        for clock in ("wall_s", "cpu_s"):
            unit = found["gemm"][clock]
            print(
                f"{n}, {clock}: GEMM {2 * n**3 / unit / 1e9:.0f} GFLOP/s; "
                + ", ".join(
                    f"{name} {found[name][clock] / unit / share:.2f}" for name, (_, share) in stages.items()
                ),
                flush=True,
            )
if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    rates((512,1024,2048))
