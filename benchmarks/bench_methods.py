"""Whole methods on one parameter: eight full fine-tunes or adapters, against their dense published form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dirmerge
from benchmarks import competitors, inputs
from benchmarks.shapes import ADAPTER_RANK, TASKS, Layer

VARIANTS = ("dense", "exact", "randomized")


def _measure_method(
    measure: Callable[..., None],
    affordable: Callable[[float], None],
    layer: Layer,
    kind: str,
    variant: str,
    method: str,
    dense: Callable[[list[torch.Tensor], int], torch.Tensor],
    *,
    spectral: bool = True,
    **options: Any,
) -> None:
    m, n = layer.m, layer.n
    p, q = min(m, n), max(m, n)
    rank = ADAPTER_RANK if kind == "adapters" else p // TASKS
    if kind == "adapters" and variant == "randomized":
        pytest.skip("adapters are decomposed exactly, whatever svd says")
    if variant == "randomized" and not spectral:
        pytest.skip(f"{method} needs no truncated SVD")
    # T decompositions and two cover spaces, or the one of the sum.
    count = TASKS + 2 if spectral else 1
    if variant == "dense":
        flops = count * inputs.svd_flops(m, n)
    elif kind == "adapters":
        flops = 8.0 * (m + n) * (TASKS * rank) ** 2
    elif variant == "exact":
        flops = count * inputs.gram_flops(m, n, rank)
    else:
        flops = TASKS * 12.0 * m * n * (rank + 16) + 2 * inputs.gram_flops(q, p, p)
    affordable(flops)
    if kind == "adapters":
        deltas: list[Any] = [inputs.adapter(m, n, rank) for _ in range(TASKS)]
        full = [delta.dense() for delta in deltas] if variant == "dense" else []
    else:
        full = deltas = [inputs.delta(m, n) for _ in range(TASKS)]

    def call() -> Any:
        if variant == "dense":
            return dense(full, rank)
        svd: dict[str, Any] = {"svd": variant} if kind == "full" else {}
        return dirmerge.merge_deltas(deltas, method, **svd, **options)

    def check(result: Any) -> None:
        if variant == "dense":
            assert result.isfinite().all()
            return
        energy = result.record.energy
        best = 1.0 if kind == "adapters" else inputs.best_energy(p, rank)
        assert all(found >= 0.98 * best for found in energy)
        if variant == "exact" and p <= 1024:
            expected = dense([d if isinstance(d, torch.Tensor) else d.dense() for d in deltas], rank)
            # The filter and the election are steps: entries at the threshold may fall on the other side.
            assert float((result.dense() - expected).norm()) <= 2e-2 * float(expected.norm())

    moved = sum(d.nbytes if isinstance(d, torch.Tensor) else 4 * rank * (m + n) for d in deltas)
    measure(f"{layer}, {kind}", variant, torch.float32, call, check, moved, flops)


KINDS = pytest.mark.parametrize("kind", ["full", "adapters"])


@KINDS
def test_dc_merge(measure: Any, affordable: Any, layer: Layer, kind: str, variant: str) -> None:
    is_full = kind == "full"
    size = min(layer.m, layer.n) if is_full else TASKS * ADAPTER_RANK

    def dense(deltas: list[torch.Tensor], rank: int) -> torch.Tensor:
        return competitors.dc_merge(deltas, rank, average=not is_full, size=size)

    _measure_method(measure, affordable, layer, kind, variant, "dc_merge", dense)


@KINDS
def test_tsv_m(measure: Any, affordable: Any, layer: Layer, kind: str, variant: str) -> None:
    _measure_method(measure, affordable, layer, kind, variant, "tsv_m", competitors.tsv_m)


@KINDS
def test_mda(measure: Any, affordable: Any, layer: Layer, kind: str, variant: str) -> None:
    # Its own default of ⌊m/T⌋ directions is more than p/T for tall matrices.
    options: dict[str, Any] = {"rank": min(layer.m, layer.n) // TASKS} if kind == "full" else {}
    _measure_method(measure, affordable, layer, kind, variant, "mda", competitors.mda, **options)


@KINDS
def test_iso_c(measure: Any, affordable: Any, layer: Layer, kind: str, variant: str) -> None:
    _measure_method(measure, affordable, layer, kind, variant, "iso_c", competitors.iso_c, spectral=False)
