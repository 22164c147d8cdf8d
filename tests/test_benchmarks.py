"""The pages and tools of benchmarks/: counts by hand, pages written anew, competitors, texts of packages."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import json
import math
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shadow import Launch

import dirmerge
from benchmarks import (
    competitors,
    inputs,
    launches,
    report,
    roofline,
    svd_choice,
    synthetic,
    throughput,
    throughput_page,
)
from benchmarks.shapes import BLOCKS, FAMILIES, LAYERS, MODELS, TASKS
from benchmarks.tasks import debian
from dirmerge import ops
from dirmerge.demo.examples import Example
from dirmerge.demo.sources import SourceError
from dirmerge.linalg import svd_truncated
from dirmerge.methods import METHODS
from dirmerge.ops.delta_sketch import random_signs

A100, H100 = roofline.GPUS[:2]


def launched(op: str, *tensors: tuple[torch.dtype, tuple[int, ...]], flops: int = 0) -> Launch:
    """A launch on tensors of these dtypes and shapes, each read or written once."""
    shapes = tuple(shape for _, shape in tensors)
    nbytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors)
    return Launch(op, 0, shapes, tuple(dtype for dtype, _ in tensors), flops, nbytes, "a.py:1")


class TestRoofline:
    """Launches priced by hand, and what a merge launches, counted by hand."""

    @pytest.mark.parametrize(
        ("dtype", "unit", "seconds"),
        [
            (torch.float32, "fp32", 2 * 4096**3 / 19.5e12),
            (torch.float64, "matrix64", 2 * 4096**3 / 19.5e12),
            (torch.bfloat16, "bf16", 2 * 4096**3 / 312e12),
        ],
    )
    def test_a_product(self, dtype: torch.dtype, unit: str, seconds: float) -> None:
        needed = roofline.work(launched("mm", *[(dtype, (4096, 4096))] * 3, flops=2 * 4096**3))
        assert (needed.part, needed.unit) == ("products", unit)
        assert needed.seconds(A100) == (seconds, "arithmetic")

    def test_delta_sketch(self) -> None:
        half, single = torch.bfloat16, torch.float32
        weights = [(half, (4096, 4096))] * 9
        made = [(single, (8, 4096, 528)), (torch.float64, (8,)), (torch.int64, (8,))]
        needed = roofline.work(launched("delta_sketch", *weights, *made))
        # 8 · 2 · 4096² · 528 multiplications and additions, each by three bfloat16 products.
        assert (needed.unit, needed.flops) == ("bf16", 425_201_762_304)
        # Nine matrices of 33 554 432 bytes; 8 results of 4096 × 528 in float32; two numbers per task.
        assert needed.nbytes == 9 * 33_554_432 + 69_206_016 + 128
        given = roofline.work(launched("delta_sketch", *weights, (single, (8, 4096, 528)), *made))
        assert (given.unit, given.flops) == ("tf32", 425_201_762_304)

    def test_gram_forms_the_upper_triangle(self) -> None:
        needed = roofline.work(launched("gram", (torch.float32, (2, 64, 8)), (torch.float32, (2, 8, 8))))
        assert (needed.unit, needed.flops) == ("tf32", 3 * 2 * 64 * 8 * 9)
        narrow = roofline.work(launched("gram", (torch.bfloat16, (64, 8)), (torch.float32, (8, 8))))
        assert (narrow.unit, narrow.flops) == ("bf16", 64 * 8 * 9)

    def test_polar_step(self) -> None:
        needed = roofline.work(launched("polar_step", *[(torch.float32, (4096, 4096))] * 2))
        # Both symmetric products by their upper triangle, 4096² · 4097 each, and 2 · 4096³; three TF32 each.
        assert (needed.unit, needed.flops) == ("tf32", 3 * (2 * 68_736_253_952 + 137_438_953_472))
        # X is read twice, G and P are written and read, the result is written: seven matrices.
        assert (needed.nbytes, needed.steps) == (7 * 67_108_864, 3)

    def test_passes_over_memory(self) -> None:
        x = (torch.float32, (4096, 4096))
        found = roofline.work(launched("kth_largest_magnitude", x)).seconds(A100)
        assert found == (3 * 67_108_864 / 2.039e12, "memory")
        assert roofline.work(launched("add", x, x, x)).seconds(A100) == (3 * 67_108_864 / 2.039e12, "memory")

    def test_a_factorisation_takes_its_steps(self) -> None:
        double = torch.float64
        needed = roofline.work(launched("_linalg_eigh", (double, (512, 512)), (double, (512,))))
        assert (needed.part, needed.unit, needed.flops) == ("factorisations", "fp64", 9 * 512**3)
        assert needed.seconds(H100) == (512 * roofline.LAUNCH, "steps")
        # Eight sweeps of 64 steps for each of three matrices; small matrices share theirs.
        batch = roofline.work(launched("_linalg_svd", (torch.float32, (3, 64, 64))))
        assert (batch.flops, batch.steps) == (3 * 48 * 64**3, 3 * 8 * 64)
        small = roofline.work(launched("_linalg_svd", (torch.float32, (3, 16, 16))))
        assert (small.flops, small.steps) == (3 * 48 * 16**3, 8)
        solved = roofline.work(launched("linalg_solve_triangular", *[(double, (3, 100, 100))] * 2))
        assert (solved.flops, solved.steps) == (3 * 100**3, 2)

    def test_waits_inside_torch_are_counted(self) -> None:
        x = (torch.float32, (8, 8))
        log = launches.Log([launched(op, x) for op in ("_linalg_eigh", "_linalg_svd", "add")], 1, 0, 0, 0)
        assert roofline.waits_of(log) == 1 + 1 + 2

    def test_a_launch_has_a_price_and_an_allocation_none(self) -> None:
        scalar = (torch.float32, ())
        assert roofline.work(launched("neg", scalar, scalar)).seconds(H100) == (roofline.LAUNCH, "steps")
        assert roofline.work(dataclasses.replace(launched("empty", scalar), nbytes=0)).seconds(H100)[0] == 0

    def test_what_has_no_model_is_refused(self) -> None:
        x = (torch.float32, (8, 8))
        with pytest.raises(ValueError, match="kernel of rotation_step has no model"):
            roofline.work(launched("rotation_step", x, x))
        with pytest.raises(ValueError, match="linalg_lu_factor_ex has no model"):
            roofline.work(launched("linalg_lu_factor_ex", x, x))

    def test_a_merge_is_the_sum_of_its_launches(self) -> None:
        square = (torch.float32, (4096, 4096))
        product = launched("mm", square, square, square, flops=2 * 4096**3)
        log = launches.Log([product, launched("add", square, square, square)], 2, 64_000, 6_400, 0)
        found = roofline.price(log, H100)
        assert found.products == found.limits["arithmetic"] == 2 * 4096**3 / 67e12
        assert found.elementwise == found.limits["memory"] == 3 * 67_108_864 / 3.35e12
        assert found.computing == found.products + found.elementwise + 2 * roofline.SYNC
        assert (found.bus_in, found.bus_out) == (1e-6, 1e-7)
        assert found.bound == "products, arithmetic"
        assert dataclasses.replace(found, bus_in=1.0).bound == "bus"

    def test_the_launches_of_a_sum(self, shadow_gpu: Any) -> None:
        one, two = (launches.record("task_arithmetic", 40, 24, T, adapters=False) for T in (2, 3))
        size = 40 * 24
        # All models and the base come in; the sum in bfloat16 and the count of its non-finite entries go out.
        assert (one.bytes_in, two.bytes_in) == (3 * 2 * size, 4 * 2 * size)
        assert one.bytes_out == two.bytes_out == 2 * size + 8
        assert one.syncs == two.syncs == 0
        found = Counter(launch.op for launch in two.launches)
        found.subtract(launch.op for launch in one.launches)
        # One task more is copied in, widened, subtracted from, scaled and added.
        assert +found == {"empty": 1, "copy_": 1, "sub": 1, "mul": 1, "add_": 1}
        bytes_of = [sum(roofline.work(launch).nbytes for launch in log.launches) for log in (one, two)]
        assert bytes_of[1] - bytes_of[0] == ((2 + 4) + (4 + 4 + 4) + (4 + 4) + (4 + 4 + 4)) * size

    def test_the_products_of_adapters(self, shadow_gpu: Any) -> None:
        log = launches.record("ties", 40, 24, 3, adapters=True)
        products = [launch for launch in log.launches if launch.flops]
        # Each B A, rank 16, is multiplied out once.
        assert [launch.flops for launch in products] == [2 * 40 * 16 * 24] * 3
        assert log.bytes_in == 2 * 40 * 24 + 3 * 2 * 16 * (40 + 24)

    def test_the_page_is_what_the_script_writes(self) -> None:
        measured = json.loads(roofline.RESULTS.read_text())
        assert roofline.PAGE.read_text() == roofline.page(measured), "python -m benchmarks.roofline"
        cases = {(row["method"], row["inputs"], *row["shape"]) for row in measured["rows"]}
        assert len(cases) == len(measured["rows"])
        assert cases == {
            (method, inputs, *shape)
            for method in METHODS
            for inputs in ("full", "adapters")
            for shape in roofline.SHAPES
        }


def run(**medians: float) -> dict[str, Any]:
    """A run with one case per keyword, five rounds each, ten per cent apart."""
    entries = [
        {
            "extra_info": {"op": name, "case": "8×8", "dtype": "float32", "implementation": "torch"},
            "options": {"timer": "perf_counter"},
            "stats": {"median": value, "iqr": 0.1 * value, "rounds": 5},
        }
        for name, value in medians.items()
    ]
    peaks = {"1": {"copy": 1e10, "float32": 1e11}}
    about = {
        "cpu": "a",
        "cores": 2,
        "threads": 1,
        "gpu": None,
        "torch": "2",
        "dirmerge": "0",
        "native": "g++",
    }
    return {"machine_info": {"dirmerge": about | {"peaks": peaks}}, "benchmarks": entries}


class TestReport:
    def test_a_comparison_names_what_changed_by_more_than_the_noise(self) -> None:
        lines = report.compare(run(a=1.0, b=1.0, c=1.0, d=1), run(a=2.0, b=0.5, c=1.15, e=1)).splitlines()
        verdicts = {line.split(" | ")[0][2:]: line.split(" | ")[-1][:-2] for line in lines if "±" in line}
        assert verdicts == {"a": "slower", "b": "faster", "c": ""}
        assert any("3 cases in both, 2 changed" in line for line in lines)
        assert "Only in the old run: 1 cases of d." in lines
        assert "New: 1 cases of e." in lines

    def test_machines_that_differ_are_said(self) -> None:
        old, new = run(a=1), run(a=1)
        assert "differ" not in report.compare(old, new)
        new = copy.deepcopy(new)
        new["machine_info"]["dirmerge"]["threads"] = 2
        assert "- threads: 1 → 2" in report.compare(old, new).splitlines()

    def test_the_table_has_the_ratio_to_the_reference_and_the_roof(self) -> None:
        both = run(a=4e-3)
        native = copy.deepcopy(both["benchmarks"][0])
        native["extra_info"] |= {"implementation": "native", "of_copy": 0.5, "of_gemm": 0.25}
        native["stats"]["median"] = 1e-3
        both["benchmarks"].append(native)
        lines = report.microbenchmarks(both)
        assert "| 8×8 | float32 | 4 ms | 1 ms | 4.00 | 50 % of copy |" in lines
        assert any("copy 10.0 GB/s" in line for line in lines)


class TestCompetitors:
    """The compositions that the ops are timed against, in NumPy as they would run in CuPy."""

    def test_ops(self) -> None:
        x, thresholds = torch.randn(4, 24, 24), torch.rand(4)
        base, left, right = torch.randn(33, 24), torch.randn(33, 5), torch.randn(24, 5)
        signs = random_signs(24, 7, 3)
        pairs: list[tuple[Callable[..., Any], list[Any], Any]] = [
            (competitors.elect_merge, [x, thresholds], ops.elect_merge(x, thresholds)),
            (competitors.etf_project, [x[0]], ops.etf_project(x[0])),
            (competitors.gram, [base], ops.gram(base)),
            (competitors.kth_largest_magnitude, [x, 9], ops.kth_largest_magnitude(x, 9)),
            (
                competitors.lowrank_add,
                [base, left, right, 0.3],
                ops.lowrank_add(base, left, right, scale=0.3),
            ),
            (competitors.polar_step, [base / 20, 1.5, -0.5, 0.2], ops.polar_step(base / 20, 1.5, -0.5, 0.2)),
            (competitors.delta, [base, -base], ops.delta(base, -base)),
            (
                competitors.delta_sketch,
                [base, [base + 1, base * 2], signs, False],
                ops.delta_sketch(base, [base + 1, base * 2], width=7, seed=3).value,
            ),
        ]
        for function, arguments, expected in pairs:
            arrays = [
                [y.numpy() for y in a]
                if isinstance(a, list)
                else a.numpy()
                if isinstance(a, torch.Tensor)
                else a
                for a in arguments
            ]
            found = function(np, *arrays)
            for one, other in zip(
                *(y if isinstance(y, tuple) else (y,) for y in (found, expected)), strict=True
            ):
                np.testing.assert_allclose(
                    one, other.numpy(), rtol=1e-5, atol=1e-5, err_msg=function.__name__
                )

    @pytest.mark.parametrize("method", ["dc_merge", "tsv_m", "mda", "iso_c"])
    def test_methods(self, method: str) -> None:
        deltas = [inputs.delta(48, 40) for _ in range(4)]
        options: dict[str, Any] = {"rank": 10} if method == "mda" else {}
        dense = {
            "dc_merge": lambda: competitors.dc_merge(deltas, 10, average=False, size=40),
            "tsv_m": lambda: competitors.tsv_m(deltas, 10),
            "mda": lambda: competitors.mda(deltas, 10),
            "iso_c": lambda: competitors.iso_c(deltas, 10),
        }[method]()
        found = dirmerge.merge_deltas(deltas, method, svd="exact", **options).dense()
        torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-4)

    def test_a_delta_has_the_stated_spectrum(self) -> None:
        found = svd_truncated(inputs.delta(60, 40), 10, "exact")
        torch.testing.assert_close(found.s.double(), inputs.spectrum(40)[:10], rtol=1e-5, atol=0)
        assert float(found.energy) == pytest.approx(inputs.best_energy(40, 10), rel=1e-5)


def test_every_family_has_layers_and_blocks() -> None:
    assert {layer.family for layer in LAYERS} == set(MODELS) == set(BLOCKS) == set(FAMILIES) - {"adapters"}
    assert TASKS == 8


TINY = synthetic.Llama(2, hidden=40, intermediate=56, vocabulary=70)


@pytest.fixture
def tiny_models(tmp_path: Path) -> list[Path]:
    """A base and three fine-tunes."""
    return synthetic.write_models(tmp_path / "models", TINY, 3)


class TestSynthetic:
    """The checks that precede every time: a right merge passes, a wrong one does not."""

    @pytest.mark.parametrize("method", ["task_arithmetic", "ties", "average"])
    def test_a_wrong_model_is_refused(self, method: str, tiny_models: list[Path], tmp_path: Path) -> None:
        recipe = synthetic.write_recipe(tmp_path / "recipe.yml", method, tiny_models[0], tiny_models[1:])
        out = tmp_path / "out"
        dirmerge.merge(recipe, out)
        assert 0 < synthetic.check_models(method, tiny_models, out) <= 1
        wrong = json.loads(recipe.read_text())
        wrong["parameters"] = {**wrong.get("parameters", {}), "lambda": 0.41}
        wrong_out = tmp_path / "wrong"
        dirmerge.merge(wrong, wrong_out)
        with pytest.raises(SystemExit, match="roundings from the formula"):
            synthetic.check_models(method, tiny_models, wrong_out)

    def test_a_value_that_is_not_finite_is_refused(self) -> None:
        truth = torch.tensor([1.0, 0.0], dtype=torch.float64)
        assert synthetic.rounding_excess(truth.bfloat16(), truth, torch.zeros(2)) == 0
        found = torch.tensor([float("nan"), 0.0], dtype=torch.bfloat16)
        assert synthetic.rounding_excess(found, truth, torch.zeros(2)) == float("inf")

    def test_the_largest_error_is_half_a_unit_in_the_last_place(self) -> None:
        # Halfway between 1 and the next bfloat16, 1 + 2^-7.
        truth = torch.tensor([1 + 2.0**-8], dtype=torch.float64)
        for value in (1.0, 1 + 2.0**-7):
            found = torch.tensor([value], dtype=torch.bfloat16)
            assert synthetic.rounding_excess(found, truth, torch.zeros(1)) == 1
        found = torch.tensor([1 + 2.0**-6], dtype=torch.bfloat16)
        assert synthetic.rounding_excess(found, truth, torch.zeros(1)) == 3

    def test_a_wrong_adapter_is_refused(self, tmp_path: Path) -> None:
        folders = synthetic.write_adapters(tmp_path, TINY, 3)
        recipe = synthetic.write_recipe(tmp_path / "recipe.yml", "task_arithmetic", None, folders)
        out = tmp_path / "out"
        dirmerge.merge(recipe, out, as_adapter=True)
        assert 0 < synthetic.check_adapter(folders, out) < 2**-7
        with pytest.raises(SystemExit, match="from the sum in float64"):
            synthetic.check_adapter(folders[:2], out)

    def test_the_threshold_keeps_the_stated_share(self) -> None:
        delta = torch.tensor([[3.0, -5.0, 1.0], [0.5, 4.0, -2.0]], dtype=torch.float64)
        assert [synthetic.ties_threshold(delta.clone(), density) for density in (0.01, 0.5, 1)] == [5, 3, 0.5]

    def test_difference(self, tiny_models: list[Path]) -> None:
        base, one, other, _ = tiny_models
        assert synthetic.difference(base, one, one) == 0
        # Two independent updates of one size are √2 of it apart.
        assert synthetic.difference(base, one, other) == pytest.approx(2**0.5, rel=0.05)

    def test_the_sizes_of_the_models(self) -> None:
        # Tied embeddings of 32000 · 2048; a layer: 4 · 2048² + 3 · 2048 · 5632 and two norms; the last norm.
        layer = 4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048
        assert synthetic.Llama(8).parameters == 32000 * 2048 + 8 * layer + 2048


class TestThroughput:
    """The script of whole commands, on tiny inputs; no time is judged."""

    def test_a_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(throughput, "METHODS", ("ties",))
        results = tmp_path / "results"
        llama = ["--layers", "1", "--hidden", "40", "--intermediate", "56", "--vocabulary", "70"]
        sizes = [*llama, "--many", "3", "--cover", "64"]
        places = ["--folder", str(tmp_path), "--results", str(results)]
        throughput.main(["--parts", "models", "mergekit", "many", "cover", "--repeats", "1", *sizes, *places])
        (file,) = results.glob("*.json")
        content = json.loads(file.read_text())
        assert {part: len(rows) for part, rows in content.items()} == {"models": 1, "many": 1, "cover": 1}
        (row,) = content["models"]
        assert row["ratio"] == row["seconds"] / (row["cat_s"] + row["cp_s"])
        assert row["must"] is None  # goals are for the sizes that they name
        page = (tmp_path / "results.md").read_text()
        assert page == throughput_page.page(results)
        assert page.count("\n## ") == 3
        assert "mergekit: skipped: give the command with --mergekit" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "results.md"]

    def test_the_peak_is_of_the_command_alone(self, tmp_path: Path) -> None:
        block = torch.ones(50 << 20)  # 210 MB in this process
        assert throughput.run_command(["true"], tmp_path / "log").peak_mb < 50 < block.nbytes / 1e6
        script = "x = b'1' * 100_000_000"
        usage = throughput.run_command([sys.executable, "-c", script], tmp_path / "log")
        assert 100 < usage.peak_mb < 150

    def test_a_command_that_fails_shows_its_output(self, tmp_path: Path) -> None:
        with pytest.raises(throughput.CommandError, match=r"exited with 3:\nno such model") as caught:
            throughput.run_command(["sh", "-c", "echo no such model >&2; exit 3"], tmp_path / "log")
        assert caught.value.output == "no such model"

    def test_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: list[Path]) -> None:
        monkeypatch.setattr(throughput, "has_option", lambda option: False)
        setting = throughput.Setting(tmp_path, 1, TINY, (2,), None, ("1GB",), None, TINY, 3, (32,))
        assert throughput.skipped("memory", setting) == "`dirmerge merge` has no option --memory"

        def fail(output: str) -> None:
            def run_command(arguments: list[str], log: Path) -> throughput.Usage:
                raise throughput.CommandError(arguments, 3, output)

            monkeypatch.setattr(throughput, "run_command", run_command)

        fail("dirmerge: --memory must be\n  at least 2 GB")
        row = throughput.memory_row(setting, TINY, tiny_models, "ties", "1GB")
        assert row["refused"] == "dirmerge: --memory must be at least 2 GB"
        fail("dirmerge: no such file")
        with pytest.raises(throughput.CommandError):
            throughput.memory_row(setting, TINY, tiny_models, "ties", "1GB")

    @pytest.mark.parametrize(("text", "megabytes"), [("500MB", 500), ("1.5gb", 1500), ("250 KB", 0.25)])
    def test_megabytes(self, text: str, megabytes: float) -> None:
        assert throughput.megabytes(text) == megabytes

    def test_a_row_replaces_its_case_and_machines_have_tables_of_their_own(self, tmp_path: Path) -> None:
        about = run()["machine_info"]["dirmerge"]
        row = {"method": "ties", "layers": 8, "parameters": 10**9, "budget": "1GB", "seconds": 1.0}
        row |= {"peak_mb": 900.0, "budget_mb": 1000.0}
        throughput.save("memory", row, about, tmp_path)
        throughput.save("memory", {**row, "peak_mb": 1100.0}, about, tmp_path)
        throughput.save("memory", {**row, "budget": "2GB", "refused": "too small"}, about, tmp_path)
        throughput.save("memory", row, {**about, "cores": 64}, tmp_path)
        tables = throughput_page.page(tmp_path).split("\nOn ")[1:]
        assert [len(re.findall(r"^\| ties", text, re.MULTILINE)) for text in tables] == [2, 1]
        assert "| ties | 1.00 G | 1GB | 1100 MB | 1 s | **missed** |" in tables[0]
        assert "| ties | 1.00 G | 2GB |  |  | refused: too small |" in tables[0]
        assert "64 cores" in tables[1]
        assert "| 900 MB | 1 s | met |" in tables[1]

    def test_the_page_is_what_the_script_writes(self) -> None:
        written = throughput_page.RESULTS.with_suffix(".md").read_text()
        assert written == throughput_page.page(), "python -m benchmarks.throughput"


def xdr_string(text: str | None, flags: int = 0x40009) -> bytes:
    if text is None:
        return struct.pack(">ii", 9, -1)
    encoded = text.encode("latin-1" if flags & 0x4000 else "utf-8")
    return struct.pack(">ii", flags, len(encoded)) + encoded


def xdr_named(names: list[str], items: list[bytes], first: bool = True) -> bytes:
    """A list with the attribute names; its symbol is a reference where it is not the first in the data."""
    symbol = struct.pack(">i", 1) + xdr_string("names") if first else struct.pack(">i", 1 << 8 | 255)
    values = struct.pack(">ii", 16, len(names)) + b"".join(map(xdr_string, names))
    attributes = struct.pack(">i", 0x402) + symbol + values + struct.pack(">i", 254)
    return struct.pack(">ii", 0x213, len(items)) + b"".join(items) + attributes


HEADER = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"


class TestRData:
    """The reader of R's serialisation, on bytes written by hand."""

    def test_a_list_of_every_vector(self) -> None:
        items = [
            struct.pack(">iiii", 13, 2, -7, 2**31 - 1),
            struct.pack(">iidd", 14, 2, 0.5, -1e300),
            struct.pack(">iii", 10, 1, 1),
            struct.pack(">ii", 16, 3) + xdr_string("é", 0x8009) + xdr_string("é", 0x4009) + xdr_string(None),
            struct.pack(">i", 254),
            xdr_named(["b"], [struct.pack(">iii", 13, 1, 4)]),
            xdr_named(["c"], [struct.pack(">iii", 13, 1, 5)], first=False),
        ]
        names = ["integer", "real", "logical", "strings", "null", "named", "again"]
        found = debian.read_r(HEADER + xdr_named(names, items, first=False)).named()
        assert {name: found[name].values for name in names[:5]} == {
            "integer": [-7, 2**31 - 1],
            "real": [0.5, -1e300],
            "logical": [1],
            "strings": ["é", "é", None],
            "null": [],
        }
        assert found["named"].named()["b"].values == [4]
        assert found["again"].named()["c"].values == [5]

    def test_version_2_has_no_encoding(self) -> None:
        data = b"X\n" + struct.pack(">iii", 2, 0x40201, 0x20300) + struct.pack(">iii", 13, 1, 3)
        assert debian.read_r(data).values == [3]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"RDX3", "not in the binary format"),
            (b"X\n" + struct.pack(">iii", 4, 0, 0), "version 4"),
            (HEADER + struct.pack(">iii", 13, 2, 3), "truncated"),
            (HEADER + struct.pack(">ii", 13, -1), "unknown length"),
            (HEADER + struct.pack(">i", 3), "type 3"),  # a closure
            (HEADER + struct.pack(">iii", 16, 1, 13) + bytes(8), "type 13 instead of a string"),
            (HEADER + xdr_named(["a"], [struct.pack(">i", 254)], first=False), "instead of a symbol"),
            (HEADER + struct.pack(">iiii", 0x20D, 1, 3, 13), "type 13 in the attributes"),
        ],
    )
    def test_anything_else_is_refused(self, data: bytes, message: str) -> None:
        with pytest.raises(SourceError, match=message):
            debian.read_r(data)

    def test_names_are_required_where_they_are_asked_for(self) -> None:
        with pytest.raises(SourceError, match="1 elements, but 0 names"):
            debian.read_r(HEADER + struct.pack(">iii", 13, 1, 3)).named()

    def test_a_lazy_load_database(self, tmp_path: Path) -> None:
        stored = [
            struct.pack(">i", len(data)) + zlib.compress(data)
            for data in (HEADER + struct.pack(">iii", 13, 1, value) for value in (3, 4))
        ]
        places = [(0, len(stored[0])), (len(stored[0]), len(stored[1]))]
        variables = xdr_named(["a", "b"], [struct.pack(">iiii", 13, 2, *place) for place in places])
        # The elements precede the attributes, so the symbol of the inner list is the first in the data.
        index = HEADER + xdr_named(["variables"], [variables], first=False)
        (tmp_path / "Rdata.rdx").write_bytes(gzip.compress(index))
        (tmp_path / "Rdata.rdb").write_bytes(b"".join(stored))
        assert debian.read_lazy(tmp_path / "Rdata", "b").values == [4]
        with pytest.raises(SourceError, match="cannot read the variable c"):
            debian.read_lazy(tmp_path / "Rdata", "c")
        (tmp_path / "Rdata.rdb").write_bytes(b"\0" * 99)
        with pytest.raises(SourceError, match="cannot read the variable a"):
            debian.read_lazy(tmp_path / "Rdata", "a")


class TestDebianTexts:
    def test_foldoc(self) -> None:
        text = """\
00-database-short
     The Free On-line Dictionary of Computing

first

   <language, history> /furst/ (First Version) A {language}
   that was the very first ["Title", 1960].

   Another paragraph, which is left out.

   (2001-01-01)

second

   1. <networking> The second {thing}, which a
   network has.

   2. <games> A field that is none of ours at all.

third

   A definition without a mark, which has <mail@example.org> inside.

.fr

   <networking> The {country code} for France and others.

short

   <jargon> {Long}.
"""
        assert debian.parse_foldoc(text) == [
            Example("A language that was the very first .", "language", "alanguagethatwastheveryfirst"),
            Example("The second thing, which a network has.", "networking", "thesecondthingwhichanetworkhas"),
        ]

    def test_a_long_definition_is_cut_and_versions_share_a_group(self) -> None:
        text = "".join(f"{n}\n\n   <jargon> {'word ' * 70}{n}\n\n" for n in "ab")
        found = debian.parse_foldoc(text)
        assert [len(example.text.split()) for example in found] == [debian.WORDS] * 2
        assert found[0].group == found[1].group == ("word" * 10)

    def test_fortunes(self) -> None:
        files = {
            "art": "One two -- three four.\n\t\t-- An Author, of\n\t\t   a book\n%\nshort\n%\n",
            "perl": "Five six seven eight nine. -- Larry Wall in <1@x>\n%\nC\x08Cafe% has no % alone\n%%\n",
            "law": "\t\t-- Only a name and nothing else\n",
        }
        assert [(e.text, e.label) for e in debian.parse_fortunes(files)] == [
            ("One two -- three four.", "art"),
            ("Five six seven eight nine.", "perl"),
            ("Cafe% has no % alone %%", "perl"),
        ]

    def test_a_novel(self) -> None:
        lines = ["EMMA", "By the author", "VOLUME I", "CHAPTER I", "", "a1", " a2", "", "a3", "a4", "a5"]
        lines += ["Chapter 2", "b1", "VOLUME II", "b2", "b3", "b4", "b5", "b6", "THE END", "c1", "c2", "c3"]
        assert debian.parse_novel("emma", lines) == [
            Example("a1 a2 a3", "emma", "emma:1"),
            Example("b1 b2 b3", "emma", "emma:2"),
            Example("b4 b5 b6", "emma", "emma:2"),
        ]

    def test_tweets(self) -> None:
        rows: list[tuple[str | None, str, int, float]] = [
            ("Jobs &amp; more\nhttps://t.co/x https…", "Twitter for iPhone", 0, 1.0),
            ("A retweet", "Twitter for iPhone", 1, 1.0),
            ("From the web", "Twitter Web Client", 0, 1.0),
            ("Too late", "Twitter for Android", 0, debian.TWEETS_END),
            (None, "Twitter for Android", 0, 1.0),
            ("12:30!", "Twitter for Android", 0, 1.0),
        ]
        names = ("text", "source", "is_retweet", "created_at")
        columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        assert debian.parse_tweets(columns) == [
            Example("Jobs & more URL https…", "Twitter for iPhone", "jobsmoreurlhttps"),
            Example("12:30!", "Twitter for Android", "12:30!"),
        ]


class TestDebianPackages:
    def test_a_missing_package_is_fetched_once_and_an_older_tree_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[list[str]] = []

        def run(command: list[str], *, cwd: Path | None = None, env: object = None) -> str:
            commands.append(command)
            if command[0] == "apt-get":
                assert cwd is not None
                (cwd / f"{command[2]}_1_all.deb").touch()
            else:
                (Path(command[3]) / "usr").mkdir(parents=True)
                (Path(command[3]) / "usr" / Path(command[2]).name).touch()
            return ""

        monkeypatch.setattr(debian, "_run", run)
        (tmp_path / "debian" / "usr").mkdir(parents=True)  # all packages in one tree, as it once was
        for package in ("one", "two", "one"):
            folder = debian.unpack(tmp_path, package)
            assert [path.name for path in (folder / "usr").iterdir()] == [f"{package}_1_all.deb"]
        assert [command[0] for command in commands] == ["apt-get", "dpkg-deb"] * 2
        assert commands[0][1:] == ["download", "one"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["debian"]

    def test_a_failure_leaves_no_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(command: list[str], *, cwd: Path | None = None, env: object = None) -> str:
            if command[0] == "dpkg-deb":
                Path(command[3]).mkdir()
                raise RuntimeError("dpkg-deb failed: broken")
            assert cwd is not None
            (cwd / "one_1_all.deb").touch()
            return ""

        monkeypatch.setattr(debian, "_run", run)
        with pytest.raises(RuntimeError, match="broken"):
            debian.unpack(tmp_path, "one")
        assert list((tmp_path / "debian").iterdir()) == []

    def test_the_message_of_a_command_that_fails(self) -> None:
        with pytest.raises(RuntimeError, match="sh failed: no such package"):
            debian._run(["sh", "-c", "echo no such package >&2; exit 100"])


class TestDebianPins:
    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The caches that the task `made`, of a wrong hash, was built for."""
        calls: list[Path] = []

        def build(cache: Path) -> list[Example]:
            calls.append(cache)
            return [
                Example(f"text {i} of {label}", label, f"{label}{i}") for i in range(20) for label in "ab"
            ]

        made = debian.DebianTask(build, {"a": "an a", "b": "a b"}, 20, "0" * 64)
        monkeypatch.setitem(debian.TASKS, "made", made)
        monkeypatch.setitem(debian.TASKS, "free", dataclasses.replace(made, sha256=None))
        return calls

    def test_changed_data_is_an_error_unless_accepted(self, tmp_path: Path, built: list[Path]) -> None:
        with pytest.raises(SourceError, match=r"must have sha256 0{64}, got .*accept_changed=True"):
            debian.prepare("made", tmp_path)
        assert not (tmp_path / "tasks").exists()
        accepted = debian.prepare("made", tmp_path, accept_changed=True)
        assert debian.prepare("made", tmp_path, accept_changed=True) == accepted
        assert len(built) == 2
        with pytest.raises(SourceError, match="sha256"):  # what was accepted once is not taken for pinned
            debian.prepare("made", tmp_path)

    def test_the_pinned_hash_is_of_the_text(
        self, tmp_path: Path, built: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = debian.prepare("made", tmp_path, accept_changed=True).to_json()
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setitem(debian.TASKS, "made", dataclasses.replace(debian.TASKS["made"], sha256=sha256))
        cached = tmp_path / "tasks" / "debian-made.json"
        assert debian.prepare("made", tmp_path).to_json() == cached.read_text(encoding="utf-8") == text
        assert len(built) == 1
        cached.write_text(text.replace("text 1 ", "text one "), encoding="utf-8")
        assert debian.prepare("made", tmp_path).to_json() == cached.read_text(encoding="utf-8") == text
        assert len(built) == 2

    def test_a_task_without_a_pin(self, tmp_path: Path, built: list[Path]) -> None:
        assert debian.prepare("free", tmp_path) == debian.prepare("free", tmp_path)
        assert len(built) == 1

    def test_the_table(self, tmp_path: Path) -> None:
        assert [name for name, task in debian.TASKS.items() if task.sha256 is None] == ["debian"]
        assert all(re.fullmatch("[0-9a-f]{64}", task.sha256 or "0" * 64) for task in debian.TASKS.values())
        with pytest.raises(ValueError, match=r"task must be one of wordnet, .*got 'none'"):
            debian.prepare("none", tmp_path)


class TestChoiceOfAnSVD:
    """Rows of benchmarks.svd_choice from small matrices, and the checks that guard their times."""

    def test_rows_and_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(svd_choice, "RESULTS", tmp_path / "svd_choice.json")
        for tasks in (4, 2, 4):
            row = svd_choice.grid_row(90, 80, "headed", tasks, runs=2)
            assert row["chosen"] == "exact"
            assert row["ratio"] == row["times"]["auto"]["least_s"] / row["times"][row["best"]]["least_s"]
            svd_choice.keep("grid", row)
        for method in ("dc_merge", "tsv_m"):
            row = svd_choice.merge_row(90, 80, "headed", 2, method, runs=1)
            assert row["cosine"] == pytest.approx(1, abs=1e-3)
            svd_choice.keep("merges", row)
        rows = [line for line in (tmp_path / "svd_choice.md").read_text().splitlines() if "90 × 80" in line]
        # A row measured again replaces the first one.
        assert [line.split(" | ")[:3] for line in rows[:2]] == [
            ["| 90 × 80", "headed", "2"],
            ["| 90 × 80", "headed", "4"],
        ]
        assert [line.split(" | ")[0] for line in rows[2:]] == ["| dc_merge", "| tsv_m"]

    def test_a_wrong_form_stops_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def shifted(a: torch.Tensor, rank: int, method: str) -> Any:
            found = svd_truncated(a, rank, "exact")
            return dataclasses.replace(found, u=found.u.roll(1, 0))

        monkeypatch.setattr(svd_choice, "svd_truncated", shifted)
        with pytest.raises(SystemExit, match="exact is wrong"):
            svd_choice.grid_row(90, 80, "flat", 4, runs=1)
