"""DC-Merge's filter at other widths: which entries pass as a fraction of d², and as a multiple of the rank.

    python -m benchmarks.tasks.widths [--widths 384 1024 2048] [--out FOLDER]

Synthetic tasks, since fine-tunes of wide models need a hub: square matrices, r = d / 8 for eight full
fine-tunes and r = 16 for eight adapters, singular values i^−0.7, singular vectors that overlap more than
chance, as those of real fine-tunes do. Accuracy cannot be read from them; what a filter keeps of the merge
can. Results go to benchmarks/results/tasks/widths.json and to the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tasks import report
from benchmarks.tasks.store import FOLDER, Results, Row
from dirmerge.api import merge_deltas
from dirmerge.deltas.lowrank import LowRank
from dirmerge.diagnostics.measures import directional_similarity, response

TASKS = 8
RULES: dict[str, dict[str, Any]] = {
    "0.001 d²": {"keep": 1e-3},
    **{f"{k} r": {"keep_per_rank": k} for k in (1, 3, 10, 30)},
}


def tasks(width: int, rank: int, seed: int = 0) -> list[LowRank]:
    """Eight tasks whose singular spaces overlap half as much again as chance gives, for full fine-tunes."""
    generator = torch.Generator().manual_seed(seed)

    def basis(shared: Tensor) -> Tensor:
        own = torch.randn(width, rank, generator=generator)
        # A part √(r/d) of each direction lies in a space of dimension r that all tasks share.
        part = (rank / width) ** 0.5
        mixed = (1 - part) ** 0.5 * own + part**0.5 * shared @ torch.randn(
            rank, rank, generator=generator
        ) / (rank**0.5)
        return torch.linalg.qr(mixed).Q

    left, right = (torch.randn(width, rank, generator=generator) for _ in range(2))
    s = torch.arange(1, rank + 1, dtype=torch.float32) ** -0.7
    return [LowRank(basis(left) * s, None, basis(right)) for _ in range(TASKS)]


def measure(width: int, rank: int, smoothing: str) -> Row:
    """Per rule: entries per rank, the update's cosine to the one without filter, and DirSim."""
    deltas = tasks(width, rank)
    plain = merge_deltas(deltas, "dc_merge", smoothing=smoothing, keep=1.0)
    factors = plain.factors
    assert factors is not None
    u, v = factors.u, factors.v
    overlap = float((u[:, :rank].mT @ u[:, rank : 2 * rank]).square().sum()) / rank
    row: Row = {"width": width, "rank": rank, "smoothing": smoothing, "overlap": overlap, "rules": {}}
    whole = plain.low_rank()
    assert whole is not None
    size = TASKS * rank
    for name, options in {**RULES, "all": {"keep": 1.0}}.items():
        merged = merge_deltas(deltas, "dc_merge", smoothing=smoothing, **options).low_rank()
        assert merged is not None
        found = response(merged, u, v)
        similar = [directional_similarity(found, block) for block in factors.blocks()]
        entries = {"keep": 1e-3 * size**2 / rank, "all": size**2 / rank}
        row["rules"][name] = {
            "entries_per_rank": options.get("keep_per_rank", entries["all" if name == "all" else "keep"]),
            "cosine": inner(merged, whole) / (merged.norm() * whole.norm()),
            "similarity": sum(similar) / len(similar),
        }
    return row


def inner(a: LowRank, b: LowRank) -> float:
    """⟨A, B⟩ of two factored matrices."""
    (left, right), (p, q) = a.folded(), b.folded()
    return float(((left.mT @ p) * (right.mT @ q)).sum(dtype=torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks.widths")
    parser.add_argument("--widths", nargs="+", type=int, default=[384, 1024, 2048, 4096])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args()
    results = Results(arguments.out / "widths.json", {"set": "widths", "tasks": TASKS})
    for width in arguments.widths:
        for kind, rank, smoothing in (("full", width // TASKS, "none"), ("lora", 16, "average")):

            def compute(width: int = width, rank: int = rank, smoothing: str = smoothing) -> Row:
                return measure(width, rank, smoothing)

            row = results.once(f"{kind} {width}", compute)
            print(kind, width, f"overlap {row['overlap']:.3f}", row["rules"], flush=True)
    report.write(arguments.out)


if __name__ == "__main__":
    main()
