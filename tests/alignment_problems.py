"""A small problem whose right answers are known: two-layer encoders, tasks that turn its features."""

from __future__ import annotations

import torch

from dirmerge.alignment import AlignmentTask, Head, Model
from dirmerge.deltas.lowrank import LowRank

D, HIDDEN, INPUT = 8, 12, 6


class Encoder(torch.nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Linear(INPUT, HIDDEN)
        self.second = torch.nn.Linear(HIDDEN, D)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self.to(dtype).eval()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def features(model, batch):
    return model.run(batch)


def updates(seed: int, dtype: torch.dtype = torch.float32, low_rank: bool = False):
    """Dense updates of every matrix and one bias, or a LowRank and a dense one."""
    generator = torch.Generator().manual_seed(100 + seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    first = random(HIDDEN, INPUT) * 0.3
    if low_rank:
        left, right = random(HIDDEN, 2), random(INPUT, 2)
        first = LowRank(left, torch.diag(torch.tensor([0.5, 0.2], dtype=dtype)), right)
    return {
        "first.weight": first,
        "second.weight": random(D, HIDDEN) * 0.2,
        "second.bias": random(D) * 0.1,
    }


def tasks(count: int = 2, classes: int = 3, batches: int = 6, size: int = 16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    found = []
    for t in range(count):
        data = [torch.randn(size, INPUT, generator=generator).to(dtype) for _ in range(batches)]
        vectors = torch.randn(classes, D, generator=generator)
        head = Head.of_class_vectors(vectors, 10.0)
        if dtype == torch.float64:
            head = Head(head.weight.double(), None, 10.0, True)
        found.append(AlignmentTask(f"task{t}", data, head, features))
    return found


def base(dtype=torch.float32):
    return Model(Encoder(dtype=dtype))
