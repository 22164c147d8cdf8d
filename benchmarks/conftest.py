"""What the benchmarks share: the cases of a run, the timing of one, the roofs it is measured against.

    python -m pytest benchmarks --benchmark-enable --ops polar --shapes llama7b --device cuda

`make bench` is the usual way in. Every case is checked before its time is kept, and runs on the device that
`--device` names, a GPU where there is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import load_timer

import dirmerge.ops  # noqa: F401  fills the backend table
from benchmarks import machine
from benchmarks.shapes import CORES, FAMILIES, LAYERS
from dirmerge import backends

SLOW = 30.0
"""Seconds of one call from which a case runs only where it was asked for."""
KEPT_STATISTICS = ("min", "median", "iqr", "rounds", "iterations")
EFFICIENCY = 1 / 3
"""What factorisations reach of the GEMM rate, to estimate those seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dirmerge")
    group.addoption("--ops", default="", help="only these ops and algorithms, with commas")
    group.addoption("--shapes", default="", help=f"only these, with commas: {', '.join(FAMILIES)}")
    group.addoption("--dtypes", default="bfloat16,float32", help="dtypes of the ops' inputs, with commas")
    group.addoption("--device", default="", help="cpu or cuda; cuda where there is a GPU")
    group.addoption("--slow-cases", action="store_true", help="also what takes half a minute a call or more")


def _listed(config: pytest.Config, option: str) -> list[str]:
    return [name for name in str(config.getoption(option)).replace(",", " ").split() if name]


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    unknown = set(_listed(config, "--shapes")) - set(FAMILIES)
    if unknown:
        raise pytest.UsageError(f"SHAPES must be among {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    if _device(config) == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU that torch can use, and there is none")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def _has_cupy(device: str) -> bool:
    if device != "cuda":
        return False
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


def running(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends that the table has for an op here, torch, the one to beat, first."""
    found = []
    for name in reversed(backends.PREFERENCE):
        try:
            with backends.backend(name):
                backends.select(op, torch.device(device), dtype)
        except RuntimeError:
            continue
        # The interpreter is for tests: its times mean nothing.
        if name != "triton" or device == "cuda":
            found.append(name)
    return found


def ascii_id(value: object) -> str:
    """The case's name as pytest shows it unescaped."""
    return str(value).replace("×", "x")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fills in `layer`, `core`, and `dtype` with `backend`: what the table runs for the module's OP."""
    config, names = metafunc.config, metafunc.fixturenames
    device, module = _device(config), metafunc.module
    if "layer" in names:
        metafunc.parametrize("layer", LAYERS, ids=ascii_id)
    if "core" in names:
        metafunc.parametrize("core", CORES, ids=ascii_id)
    if "backend" in names:
        dtypes = [getattr(torch, name) for name in _listed(config, "--dtypes")]
        dtypes = [dtype for dtype in dtypes if dtype in getattr(module, "DTYPES", dtypes)]
        pairs = [(dtype, name) for dtype in dtypes for name in running(module.OP, device, dtype)]
        if _has_cupy(device) and getattr(module, "CUPY", False):
            # CuPy has no bfloat16 arithmetic.
            pairs += [(dtype, "cupy") for dtype in dtypes if dtype != torch.bfloat16]
        ids = [f"{str(dtype).removeprefix('torch.')}-{name}" for dtype, name in pairs]
        metafunc.parametrize(("dtype", "backend"), pairs, ids=ids)
    if "variant" in names:
        variants = [name for name in module.VARIANTS if name != "cupy" or _has_cupy(device)]
        metafunc.parametrize("variant", variants)


def _family(item: pytest.Function) -> str | None:
    """The shape family of a case: that of the first parameter that has one."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    found = (getattr(value, "family", None) for value in params.values())
    return next((name for name in found if name), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ops, shapes = _listed(config, "--ops"), _listed(config, "--shapes")
    known = {item.originalname.removeprefix("test_") for item in items if isinstance(item, pytest.Function)}
    unknown = set(ops) - known
    if unknown:
        raise pytest.UsageError(
            f"OPS must be among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}"
        )
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        assert isinstance(item, pytest.Function)
        is_asked = not ops or item.originalname.removeprefix("test_") in ops
        is_asked &= not shapes or _family(item) in shapes
        (kept if is_asked else left_out).append(item)
        if _device(config) == "cuda":
            item.add_marker(pytest.mark.benchmark(timer=machine.synchronised))
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


_peaks: dict[str, dict[str, float]] = {}


@pytest.fixture(scope="session")
def peaks(pytestconfig: pytest.Config) -> dict[str, float]:
    """This machine's copy bandwidth and GEMM rates at the thread count in force, measured once per run."""
    device = _device(pytestconfig)
    clock = (
        machine.synchronised
        if device == "cuda"
        else load_timer(str(pytestconfig.getoption("benchmark_timer"))).target
    )
    if not _peaks:
        _peaks.update(machine.measured_peaks(device, clock))
    return _peaks[str(torch.get_num_threads())]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keeps what a reader of the numbers needs: the machine in words and its measured peaks."""
    machine_info.clear()
    machine_info["dirmerge"] = machine.describe(_device(config)) | {"peaks": dict(_peaks)}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Sequence[Any], output_json: dict[str, Any]
) -> None:
    """Leaves out the time of every single round and what the name of a case says already."""
    output_json.pop("commit_info", None)
    for entry in output_json["benchmarks"]:
        for name in ("params", "param", "fullname", "group"):
            entry.pop(name, None)
        entry["options"] = {"timer": entry["options"]["timer"]}
        entry["stats"] = {name: entry["stats"][name] for name in KEPT_STATISTICS}


@pytest.fixture(autouse=True)
def _on_the_device(pytestconfig: pytest.Config) -> Iterator[None]:
    """Makes every tensor of a benchmark on its device, from the same seed."""
    torch.set_default_device(_device(pytestconfig))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


@pytest.fixture
def affordable(pytestconfig: pytest.Config, peaks: dict[str, float]) -> Callable[[float], None]:
    """Skips a case whose FLOPs take half a minute a call on this machine, unless it was asked for."""

    def decide(flops: float) -> None:
        seconds = flops / (EFFICIENCY * peaks["float32"])
        is_asked = pytestconfig.getoption("--slow-cases") or _listed(pytestconfig, "--shapes")
        if seconds >= SLOW and not is_asked:
            pytest.skip(f"about {seconds:.0f} s a call here: name its SHAPES, or SLOW=1, to run it")

    return decide


def _arrays(value: Any, xp: Any) -> Any:
    """Tensors as arrays of xp without a copy, inside lists too; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return xp.from_dlpack(value)
    return [_arrays(one, xp) for one in value] if isinstance(value, list) else value


def _tensors(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_tensors(one) for one in value)
    return torch.utils.dlpack.from_dlpack(value) if hasattr(value, "__dlpack__") else value


@pytest.fixture
def measure(benchmark: Any, peaks: dict[str, float], request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times one case of one op or algorithm, after its result was checked.

    measure(case, implementation, dtype, call, check, bytes_moved, flops) keeps a time only if
    check(call()) passes. `bytes_moved` counts every input and output once, `flops` the products of the
    method. 0.3 seconds of rounds, at least five; three of a call above a second, one above five.

    `implementation` is a backend, which is then forced, or the name of a variant. Further arguments: `gemm`,
    the dtype whose GEMM rate is the roof of the FLOPs, by default float32, or float64 for float64; `cupy`, a
    function of benchmarks.competitors with its arguments, which takes the place of the call where the
    implementation is "cupy".
    """

    def run(
        case: object,
        implementation: str,
        dtype: torch.dtype,
        call: Callable[[], Any],
        check: Callable[[Any], None],
        bytes_moved: int,
        flops: float = 0,
        *,
        gemm: torch.dtype | None = None,
        cupy: tuple[Callable[..., Any], list[Any]] | None = None,
    ) -> None:
        op = request.node.originalname.removeprefix("test_")
        name = str(dtype).removeprefix("torch.")
        roof = str(gemm or (torch.float64 if dtype == torch.float64 else torch.float32))
        benchmark.group = f"{op}, {case}, {name}"
        result_of = lambda result: result  # noqa: E731
        if implementation == "cupy" and cupy is not None:
            import cupy as xp

            function, arguments = cupy[0], _arrays(cupy[1], xp)
            call, result_of = (lambda: function(xp, *arguments)), _tensors
        with backends.backend(implementation if implementation in backends.PREFERENCE else "auto"):
            check(result_of(call()))
            clock = benchmark._timer or time.perf_counter
            start = clock()
            call()
            elapsed = max(clock() - start, 1e-9)
            rounds = 1 if elapsed > 5 else 3 if elapsed > 1 else min(50, max(5, int(0.3 / elapsed)))
            benchmark.pedantic(call, rounds=rounds, iterations=max(1, int(2e-3 / elapsed)))
        benchmark.extra_info.update(
            op=op, case=str(case), implementation=implementation, dtype=name, bytes=bytes_moved, flops=flops
        )
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.median
            benchmark.extra_info["of_copy"] = bytes_moved / seconds / peaks["copy"]
            if flops:
                benchmark.extra_info["of_gemm"] = flops / seconds / peaks[roof.removeprefix("torch.")]

    return run
