"""Fine-tunes and their merged updates, and the accuracy of a model that has one."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tasks.experiments import Post, Variant, family
from dirmerge.deltas.lowrank import LowRank
from dirmerge.demo.evaluate import Probe, correct
from dirmerge.diagnostics.measures import directional_similarity, response
from dirmerge.linalg import polar
from dirmerge.methods import Tasks, get_method, merge_tasks
from dirmerge.methods.mda import column_signs
from dirmerge.methods.scale import alignment_terms
from dirmerge.methods.spectral import factor_tasks
from dirmerge.methods.tasks import Factors, kept_ranks
from dirmerge.ops import etf_project


@dataclasses.dataclass(frozen=True)
class FineTunes:
    """The deltas of a set of fine-tunes: per tensor name one delta per task, and whether it is a matrix."""

    kind: str
    tasks: tuple[str, ...]
    deltas: Mapping[str, list[Tensor | LowRank]]
    _factors: dict[str, Factors] = dataclasses.field(default_factory=dict, repr=False)

    def of(self, name: str) -> Tasks:
        """The deltas of one tensor as the methods take them."""
        deltas = self.deltas[name]
        loaders = [lambda delta=delta: delta for delta in deltas]
        ranks = [delta.rank if isinstance(delta, LowRank) else None for delta in deltas]
        return Tasks(tuple(deltas[0].shape), loaders, ranks, self.tasks)

    def single(self, t: int) -> Merge:
        """The update that makes the base task t's own fine-tune."""
        own = {name: deltas[t] for name, deltas in self.deltas.items()}
        return Merge({k: d.dense() if isinstance(d, LowRank) else d for k, d in own.items()})

    def factors(self, name: str) -> Factors:
        """The tasks' leading singular triplets of one matrix, ⌊p/T⌋ or the adapter's rank, computed once."""
        if name not in self._factors:
            tasks = self.of(name)
            self._factors[name] = factor_tasks(tasks, kept_ranks(tasks), "exact", 1e-2, 0)
        return self._factors[name]

    def truncated(self) -> FineTunes:
        """The same with every matrix cut to its leading triplets, which spares each study their SVD."""
        deltas: dict[str, list[Tensor | LowRank]] = {}
        for name, parts in self.deltas.items():
            if len(parts[0].shape) != 2:
                deltas[name] = parts
                continue
            f = self.factors(name)
            deltas[name] = [
                LowRank(f.u[:, block] * s, None, f.v[:, block])
                for block, s in zip(f.blocks(), f.s, strict=True)
            ]
        return FineTunes(self.kind, self.tasks, deltas)


def load_finetunes(kind: str, folders: Mapping[str, Path], base: Mapping[str, Tensor]) -> FineTunes:
    """Reads the deltas of adapters (LowRank, scaling alpha / r) or of full fine-tunes (encoder tensors)."""
    deltas: dict[str, list[Tensor | LowRank]] = {}
    for folder in folders.values():
        if family(kind) == "lora":
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
    """A method's update, at λ = 1.

    Attributes:
        scaled: per tensor what λ multiplies.
        fixed: means of vectors, which it does not.
        alignment: a(D) over all matrices.
        norm: ‖D‖_F over all matrices.
        similarity: DirSim, mean over matrices and tasks.
        seconds: of the merging alone.
    """

    scaled: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    alignment: float = 1.0
    norm: float = 0.0
    similarity: float = 0.0
    seconds: float = 0.0


def merge(finetunes: FineTunes, variant: Variant) -> Merge:
    """Merges all tensors by a method; those that are no matrices get the mean, unless it works entrywise."""
    scaled: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    numerator = denominator = energy = seconds = 0.0
    similarities: list[float] = []
    ones = [1.0] * len(finetunes.tasks)
    source = finetunes.truncated() if variant.truncated else finetunes
    for name in finetunes.deltas:
        tasks = source.of(name)
        matrix = len(tasks.shape) == 2
        start = time.perf_counter()
        if matrix or get_method(variant.method).elementwise:
            merged = merge_tasks(tasks, variant.method, ones, dict(variant.options))
            scaled[name] = merged.dense()
        else:
            fixed[name] = torch.stack([tasks.dense(t) for t in range(len(tasks))]).mean(0)
        seconds += time.perf_counter() - start
        if matrix:
            factors = finetunes.factors(name)
            if variant.post is not None:
                scaled[name] = _afterwards(scaled[name], factors, variant.post)
                merged = dataclasses.replace(merged, value=scaled[name])
            merged.factors = factors
            terms = alignment_terms(finetunes.of(name), merged)
            numerator, denominator = numerator + terms[0], denominator + terms[1]
            energy += float(scaled[name].square().sum(dtype=torch.float64))
            found = response(merged.value, factors.u, factors.v)
            similarities += [directional_similarity(found, block) for block in factors.blocks()]
    mean_similarity = sum(similarities) / len(similarities)
    return Merge(scaled, fixed, numerator / denominator, energy**0.5, mean_similarity, seconds)


def _afterwards(delta: Tensor, factors: Factors, post: Post) -> Tensor:
    """What a study does with a merged update: MDA's centring on the shared frame, or more whitening.

    A method that aggregates in polar frames has exponent 1 on each side; (UUᵀ + εI)^(−x/2) on the left and
    the same with V on the right, on their spans, make it 1 + x.
    """
    if post.centre:
        q = polar(factors.u, complete=False).q * column_signs(factors.u)
        outside = delta - q @ (q.mT @ delta)
        delta = outside + q @ etf_project(q.mT @ delta)
    for bases, exponent, side in ((factors.u, post.left, 0), (factors.v, post.right, 1)):
        if exponent:
            basis, s, _ = torch.linalg.svd(bases.double(), full_matrices=False)
            kept = s > 1e-6 * s[0]
            basis, powers = basis[:, kept], (s[kept].square() + post.ridge) ** (-exponent / 2)
            root = ((basis * powers) @ basis.mT).to(delta.dtype)
            delta = root @ delta if side == 0 else delta @ root
    return delta


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
