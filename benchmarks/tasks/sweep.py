"""Every method's merged update, computed once per fine-tune set, and its accuracy over a grid of scales."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dirmerge.demo.evaluate import Probe, correct
from dirmerge.lowrank import LowRank
from dirmerge.methods import Tasks, get_method, merge_tasks
from dirmerge.scale import alignment_terms

# name → (method, options). Defaults follow the input: smoothing and rank differ between the two settings.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "average": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "wudi": ("wudi", {}),
    "tsv_m": ("tsv_m", {}),
    "mda": ("mda", {}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "dc_merge": ("dc_merge", {}),
    "whitened": ("whitened", {}),
}
# WUDI by Adam makes adapters dense and takes a hundred times longer than its exact minimiser.
ADAPTER_VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: variant for name, variant in VARIANTS.items() if name != "wudi"},
    "wudi (exact)": ("wudi", {"solver": "exact"}),
    "dc_merge (linear)": ("dc_merge", {"smoothing": "linear"}),
}
# What other settings of a method would do; `--study` runs them beside the tables' rows. Multiples of the rank
# as keep: entries per task over d², d = 384 and r = 48 for most full matrices, 128 and 16 for adapters.
STUDIES: dict[str, dict[str, dict[str, tuple[str, dict[str, object]]]]] = {
    "frames": {
        kind: {f"mda {frame}": ("mda", {"frame": frame}) for frame in ("blocks", "canonical", "random")}
        for kind in ("full", "lora")
    },
    "keep": {
        kind: {f"dc_merge keep {k}r": ("dc_merge", {"keep": k * r / d**2}) for k in (1, 3, 10, 30)}
        for kind, r, d in (("full", 48, 384), ("lora", 16, 128))
    },
    "whitened": {
        kind: {
            f"whitened {a} {b} {ridge}": (
                "whitened",
                {"left_exponent": a, "right_exponent": b, "ridge": ridge},
            )
            for a, b, ridge in ((1.0, 1.0, 0.03), (1.5, 1.5, 0.0), (1.5, 1.5, 0.03), (2.0, 2.0, 0.1))
        }
        for kind in ("full", "lora")
    },
}
# Scales are scanned as alignment targets a(λD): raw λ of equal quality differ tenfold between methods.
TARGETS = {
    "lora": (0.06, 0.09, 0.13, 0.18, 0.24, 0.3, 0.36, 0.42, 0.5, 0.6, 0.75),
    "full": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3),
}
START = {"lora": 0.36, "full": 0.8}


@dataclasses.dataclass(frozen=True)
class FineTunes:
    """The deltas of a set of fine-tunes: per tensor name one delta per task, and whether it is a matrix."""

    kind: str
    tasks: tuple[str, ...]
    deltas: Mapping[str, list[Tensor | LowRank]]

    def of(self, name: str) -> Tasks:
        """The deltas of one tensor as the methods take them."""
        deltas = self.deltas[name]
        loaders = [lambda delta=delta: delta for delta in deltas]
        ranks = [delta.rank if isinstance(delta, LowRank) else None for delta in deltas]
        return Tasks(tuple(deltas[0].shape), loaders, ranks, self.tasks)

    def single(self, t: int) -> Merge:
        """The update that makes the base task t's own fine-tune."""
        own = {name: deltas[t] for name, deltas in self.deltas.items()}
        return Merge({k: d.dense() if isinstance(d, LowRank) else d for k, d in own.items()}, {}, 1.0, 0.0)


def load_finetunes(kind: str, folders: Mapping[str, Path], base: Mapping[str, Tensor]) -> FineTunes:
    """Reads the deltas of adapters (LowRank, scaling alpha / r) or of full fine-tunes (encoder tensors)."""
    deltas: dict[str, list[Tensor | LowRank]] = {}
    for folder in folders.values():
        if kind == "lora":
            tensors = load_file(folder / "adapter_model.safetensors")
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            for key in sorted(k for k in tensors if k.endswith(".lora_A.weight")):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[key.replace(".lora_A.", ".lora_B.")]
                delta = LowRank.from_lora(b, tensors[key], config["lora_alpha"] / config["r"])
                deltas.setdefault(f"{module}.weight", []).append(delta)
        else:
            tensors = load_file(folder / "model.safetensors")
            for key in sorted(k for k in tensors if k.startswith("encoder.")):
                deltas.setdefault(key, []).append(tensors[key] - base[key])
    return FineTunes(kind, tuple(folders), deltas)


@dataclasses.dataclass(frozen=True)
class Merge:
    """A method's update: `scaled` is multiplied by λ, `fixed` (means of vectors) is not; a(D) is of λ = 1."""

    scaled: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    alignment: float
    seconds: float


def merge(finetunes: FineTunes, method: str, options: Mapping[str, object]) -> Merge:
    """Merges all tensors by a method; those that are no matrices get the mean, unless it works entrywise."""
    scaled: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    numerator = denominator = seconds = 0.0
    ones = [1.0] * len(finetunes.tasks)
    for name in finetunes.deltas:
        tasks = finetunes.of(name)
        matrix = len(tasks.shape) == 2
        start = time.perf_counter()
        if matrix or get_method(method).elementwise:
            merged = merge_tasks(tasks, method, ones, dict(options))
            scaled[name] = merged.dense()
        else:
            fixed[name] = torch.stack([tasks.dense(t) for t in range(len(tasks))]).mean(0)
        seconds += time.perf_counter() - start
        if matrix:
            terms = alignment_terms(tasks, merged)
            numerator, denominator = numerator + terms[0], denominator + terms[1]
    return Merge(scaled, fixed, numerator / denominator, seconds)


@torch.no_grad()
def set_weights(
    model: torch.nn.Module, base: Mapping[str, Tensor], update: Merge | None, scale: float = 1.0
) -> None:
    """Sets the model to base + scale · scaled + fixed; to the base where there is no update."""
    for name, parameter in model.named_parameters():
        if update is not None and name in update.scaled:
            torch.add(base[name], update.scaled[name], alpha=scale, out=parameter)
        elif update is not None and name in update.fixed:
            torch.add(base[name], update.fixed[name], out=parameter)
        else:
            parameter.copy_(base[name])


def evaluate(model: torch.nn.Module, probes: Sequence[Probe], *, bf16: bool) -> dict[str, str]:
    """Per task a string of 0 and 1, one per text: kept so that methods can be compared text by text."""
    return {p.name: "".join("01"[hit] for hit in correct(model, p, bf16=bf16).tolist()) for p in probes}


def mean(bits: str) -> float:
    """The accuracy that a string of `evaluate` stands for."""
    return bits.count("1") / len(bits)


def scan(
    model: torch.nn.Module,
    base: Mapping[str, Tensor],
    update: Merge,
    kind: str,
    validation: Sequence[Probe],
    own: Mapping[str, float],
    *,
    bf16: bool,
) -> list[dict[str, float]]:
    """Normalised validation accuracy over alignment targets, outwards from the usual one.

    Each direction ends after two targets in a row that are below the best one so far.

    Args:
        model: any encoder of the base's shape; its weights are overwritten.
        base: the base model's tensors.
        update: the merge.
        kind: lora or full, which chooses the grid.
        validation: the probes.
        own: each task's own fine-tune's validation accuracy.
        bf16: run under bfloat16 autocast.

    Returns:
        Rows of alignment (the target), scale (λ) and normalised accuracy, in the order of the targets.
    """
    rows: dict[float, dict[str, float]] = {}

    def measure(target: float) -> float:
        scale = target / update.alignment
        set_weights(model, base, update, scale)
        hits = evaluate(model, validation, bf16=bf16)
        normalised = sum(mean(bits) / own[name] for name, bits in hits.items()) / len(hits)
        rows[target] = {"alignment": target, "scale": scale, "normalised": normalised}
        return normalised

    grid = TARGETS[kind]
    start = grid.index(START[kind])
    best = measure(grid[start])
    for side in (grid[start + 1 :], grid[:start][::-1]):
        below = 0
        for target in side:
            value = measure(target)
            below = 0 if value >= best else below + 1
            best = max(best, value)
            if below == 2:
                break
    return [rows[target] for target in sorted(rows)]
