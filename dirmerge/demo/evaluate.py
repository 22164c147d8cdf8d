"""Accuracy of encoders on the tasks, with the base model's frozen heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dirmerge.demo.examples import TaskData
from dirmerge.demo.model import Tokenizer, embed, head, logits


@dataclass(frozen=True)
class Probe:
    """Tokenised texts of one task with their labels and the task's frozen head."""

    name: str
    ids: list[list[int]]
    labels: Tensor
    head: Tensor


def make_probe(
    task: TaskData, split: str, base: torch.nn.Module, tokenizer: Tokenizer, *, texts: int | None = None
) -> Probe:
    """The first `texts` of a task's split, ready to evaluate any encoder on.

    Args:
        task: the prepared task.
        split: train, validation or test.
        base: the base model, which makes the head.
        tokenizer: its tokenizer.
        texts: at most so many; None for all. The split's order is a fixed random one.
    """
    pairs = {"train": task.train, "validation": task.validation, "test": task.test}[split][:texts]
    ids = tokenizer([text for text, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    return Probe(task.name, ids, labels, head(base, tokenizer, task.prompts))


def correct(model: torch.nn.Module, probe: Probe, *, bf16: bool) -> Tensor:
    """(n,) bool: whether the largest logit of each text is its label's."""
    return logits(embed(model, probe.ids, bf16=bf16), probe.head).argmax(1).eq(probe.labels)


def accuracy(model: torch.nn.Module, probe: Probe, *, bf16: bool) -> float:
    """The fraction of the probe's texts that the model classifies correctly."""
    return correct(model, probe, bf16=bf16).double().mean().item()


def accuracies(model: torch.nn.Module, probes: Sequence[Probe], *, bf16: bool) -> dict[str, float]:
    """The accuracy on every probe, by task."""
    return {probe.name: accuracy(model, probe, bf16=bf16) for probe in probes}


def average(values: Mapping[str, float]) -> float:
    """The mean over tasks."""
    return sum(values.values()) / len(values)


def normalised(values: Mapping[str, float], own: Mapping[str, float]) -> float:
    """The mean over tasks of accuracy divided by that of the task's own fine-tune."""
    return sum(value / own[name] for name, value in values.items()) / len(values)


def standard_error(values: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The binomial standard error of the average over tasks: √(Σ p(1 − p)/n) / T."""
    return math.sqrt(sum(p * (1 - p) / sizes[name] for name, p in values.items())) / len(values)
