"""Exact mode equals the outputs of the published implementations, kept in peer_outputs.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dirmerge
from dirmerge import LowRank

FIXTURES = load_file(Path(__file__).parent / "peer_outputs.safetensors")
# Relative Frobenius distance; iso_cts is ill-conditioned, wudi was run in float32.
TOLERANCE = {"dc_merge": 2e-5, "tsv_m": 2e-5, "iso_cts": 5e-4, "wudi": 1e-3}


def stack(prefix: str) -> list[torch.Tensor]:
    count = sum(name.startswith(prefix) for name in FIXTURES)
    return [FIXTURES[f"{prefix}{t}"] for t in range(count)]


def distance(merged: torch.Tensor, expected: torch.Tensor) -> float:
    return float((merged.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("method", TOLERANCE)
@pytest.mark.parametrize("setting", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_fine_tunes(setting, method, dtype):
    deltas = [delta.to(dtype) for delta in stack(f"full.{setting}.task.")]
    options: dict[str, Any] = {} if method == "wudi" else {"svd": "exact"}
    merged = dirmerge.merge_deltas(deltas, method, **options)
    assert distance(merged.dense(), FIXTURES[f"full.{setting}.{method}"]) < TOLERANCE[method]


@pytest.mark.parametrize(
    ("method", "options", "output"),
    [
        ("dc_merge", {}, "dc_merge.avg"),
        ("dc_merge", {"smoothing": "linear"}, "dc_merge.linear"),
        ("tsv_m", {}, "tsv_m"),
        ("iso_cts", {}, "iso_cts"),
        ("wudi", {}, "wudi"),
    ],
)
@pytest.mark.parametrize("setting", [0, 1])
@pytest.mark.parametrize("form", ["factored", "multiplied out"])
def test_adapters(setting, method, options, output, form):
    deltas = [
        LowRank.from_lora(b, a)
        for b, a in zip(stack(f"lora.{setting}.B."), stack(f"lora.{setting}.A."), strict=True)
    ]
    if form == "multiplied out" and method != "wudi":
        # Dense deltas do not show that they are adapters: the rank and the smoothing must be said.
        options = {"rank": 16, **({"smoothing": "average"} | options if method == "dc_merge" else options)}
    merged = dirmerge.merge_deltas(
        deltas if form == "factored" else [delta.dense() for delta in deltas], method, **options
    )
    assert distance(merged.dense(), FIXTURES[f"lora.{setting}.{output}"]) < TOLERANCE[method]
    if form == "factored" and method != "wudi":
        assert merged.low_rank().rank == 16 * len(deltas)
