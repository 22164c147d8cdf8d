"""What the benchmarks of the ops share: collection, the timing of one case, the machine's description."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dirmerge import __version__, backends


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    native = backends.native_build_info()
    machine_info["dirmerge"] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dirmerge": __version__,
        "native": native if isinstance(native, str) else f"{native['compiler']}, {native['runs_on']}",
    }


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Times one case of one op under one backend, after its result was checked.

    measure(case, backend, dtype, call, check, bytes_moved, flops) keeps a time only if check(call()) passes.
    Five to fifty rounds, about a second.
    """

    def run(
        case: str,
        backend: str,
        dtype: torch.dtype,
        call: Callable[[], Any],
        check: Callable[[Any], None],
        bytes_moved: int,
        flops: int = 0,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        benchmark.group = f"{benchmark.name.split('[')[0]} {case} {name}"
        benchmark.extra_info.update(
            case=case, backend=backend, dtype=name, bytes_moved=bytes_moved, flops=flops
        )
        with backends.backend(backend):
            check(call())
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            rounds = min(50, max(5, int(1 / max(elapsed, 1e-9))))
            benchmark.pedantic(call, rounds=rounds, iterations=max(1, int(2e-3 / max(elapsed, 1e-9))))

    return run
