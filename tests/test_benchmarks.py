"""The pages and tools of benchmarks/: counts by hand, pages written anew, competitors that are right."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import dirmerge
from benchmarks import competitors, inputs, report, roofline
from benchmarks.shapes import BLOCKS, FAMILIES, LAYERS, MODELS, TASKS
from dirmerge import ops
from dirmerge.linalg import svd_truncated
from dirmerge.ops.delta_sketch import random_signs

A100 = roofline.GPUS[0]


class TestRoofline:
    """Eight fine-tunes of a 4096 × 4096 matrix in bfloat16, by hand."""

    def test_delta_sketch(self) -> None:
        cost = roofline.delta_sketch(4096, 4096, 528, 8)
        # 8 · 2 · 4096² · 528 multiplications and additions, each by three bfloat16 products.
        assert cost.flops == {"bf16": 141_733_920_768}
        assert cost.work("bf16") == 425_201_762_304
        # Nine matrices of 33 554 432 bytes; 8 results of 4096 × 528 in float32.
        assert cost.bytes == 9 * 33_554_432 + 69_206_016
        seconds, limit = cost.seconds(A100)
        assert limit == "bf16"
        assert seconds == pytest.approx(1.3628e-3, rel=1e-4)

    def test_a_given_test_matrix_is_read_and_narrow_products_are_one(self) -> None:
        cost = roofline.delta_sketch(4096, 4096, 528, 8, narrow=True, given=True)
        assert cost.work("bf16") == 141_733_920_768
        assert cost.bytes == 9 * 33_554_432 + 2 * 69_206_016
        assert roofline.delta_sketch(4096, 4096, 528, 8, given=True).work("tf32") == 425_201_762_304

    def test_polar_step(self) -> None:
        cost = roofline.polar_step(4096, 4096)
        # Both symmetric products by their upper triangle, 4096² · 4097 each, and 2 · 4096³; three TF32 each.
        assert cost.work("tf32") == 3 * (2 * 68_736_253_952 + 137_438_953_472)
        # X is read twice, G and P are written and read, the result is written: seven matrices.
        assert cost.bytes == 7 * 67_108_864

    def test_memory_binds_the_passes(self) -> None:
        found = roofline.kth_largest_magnitude(4096, 8)
        assert found.bytes == 3 * 8 * 67_108_864
        assert found.seconds(A100) == (found.bytes / 2.039e12, "memory")
        assert roofline.elect_merge(8 * 512 * 512, 8).bytes == 9 * 8 * 512 * 512 * 4
        assert roofline.etf_project_add(4096, 4096).bytes == 2 * 67_108_864 + 2 * 33_554_432

    def test_lowrank_add(self) -> None:
        cost = roofline.lowrank_add(4096, 4096, 128)
        assert cost.work("tf32") == 3 * 4_294_967_296
        assert cost.bytes == 2 * 33_554_432 + 2 * 2_097_152

    def test_a_sum_multiplies_out_the_passes(self) -> None:
        both = roofline.delta_sketch(64, 64, 8, 2) + roofline.delta_sketch(64, 64, 8, 2, narrow=True)
        assert both.work("bf16") == 4 * 2 * 2 * 64 * 64 * 8

    def test_a_model_of_7b(self) -> None:
        base, tasks = roofline.model_bytes("llama7b", adapters=False)
        # 32 blocks of 4 · 4096² + 3 · 4096 · 11008 entries of two bytes.
        assert base == 2 * 32 * 202_375_168
        assert tasks == 8 * base
        assert roofline.model_bytes("llama7b", adapters=True)[1] == 2 * 8 * 16 * 32 * (
            8 * 4096 + 6 * 7552 + 0
        )

    def test_dc_merge_has_two_stages_more_than_tsv_m(self) -> None:
        for adapters in (False, True):
            names = [
                [name for name, _ in roofline.merge("llama7b", dc_merge=dc_merge, adapters=adapters)]
                for dc_merge in (True, False)
            ]
            assert [name for name in names[0] if name not in names[1]] == [
                "coordinates",
                "threshold, election",
            ]

    def test_the_page_is_what_the_script_writes(self) -> None:
        assert roofline.PAGE.read_text() == roofline.page(), "python -m benchmarks.roofline"
        assert "A prediction" in roofline.page()


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
        q = torch.randn(33)
        mask = torch.block_diag(*[torch.ones(6, 6)] * 4)
        signs = random_signs(24, 7, 3)
        pairs = [
            (competitors.elect_merge, [x, thresholds, mask], ops.elect_merge(x, thresholds, None, [6] * 4)),
            (competitors.etf_project, [x[0]], ops.etf_project(x[0])),
            (
                competitors.etf_project_add,
                [base, base, q, 5, 0.3],
                ops.etf_project_add(base, base, q, 5, scale=0.3),
            ),
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
        options = {"rank": 10} if method == "mda" else {}
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
