"""A step of the learned alignment against forward and backward of the model alone, on the demo's model.

The competitor is the least any gradient method needs: the same batches through the same model with the same
loss, and ∂L/∂W of the same matrices, nothing else. The gradient of λ is compared with autograd's first.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dirmerge import LowRank
from dirmerge.alignment import AlignmentTask, Head, LearnOptions, Model, Pooled
from dirmerge.alignment.heads import as_head
from dirmerge.alignment.learner import Learner
from dirmerge.alignment.losses import entropy
from dirmerge.alignment.weights import ScaledUpdates

N_TASKS, BATCH, TOKENS, CLASSES, RANK = 8, 16, 24, 16, 8
ROUNDS, LIMIT = 5, 1.3
MATRICES = ("query.weight", "key.weight", "value.weight", "dense.weight")


def _encoder() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(  # all-MiniLM-L6
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    module: torch.nn.Module = transformers.BertModel(config, add_pooling_layer=False).eval()
    return module


def _tasks() -> list[AlignmentTask]:
    found = []
    for t in range(N_TASKS):
        tokens = torch.randint(1000, 30000, (4, BATCH, TOKENS))
        mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
        data = [{"input_ids": ids, "attention_mask": mask} for ids in tokens]
        head = Head.of_class_vectors(torch.randn(CLASSES, 384), 20.0)
        found.append(AlignmentTask(f"task{t}", data, head, Pooled("mean")))
    return found


def _updates(module: torch.nn.Module, form: str) -> dict[str, Any]:
    names = [name for name, _ in module.named_parameters() if name.endswith(MATRICES)]
    updates: dict[str, Any] = {}
    for name in names:
        m, n = module.get_parameter(name).shape
        if form == "factored":
            updates[name] = LowRank(
                torch.randn(m, N_TASKS * RANK), None, torch.randn(n, N_TASKS * RANK) * 1e-3
            )
        elif form == "per task":
            updates[name] = [torch.randn(m, n) * 1e-3 for _ in range(N_TASKS)]
        else:
            updates[name] = torch.randn(m, n) * 1e-2
    return updates


def _components(updates: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: value if isinstance(value, list) else [value] for name, value in updates.items()}


def _entropy(task: AlignmentTask, model: Model) -> Tensor:
    head = as_head(task.head)
    return entropy(head.logits(task.read(model, task.batch_list()[0])))


def _check(model: Model, updates: dict[str, Any], tasks: list[AlignmentTask]) -> None:
    """Asserts that the gradient of λ is autograd's, to float32."""
    weights = ScaledUpdates(model, _components(updates), 0.3)
    task = tasks[0]
    _entropy(task, weights.model).backward()
    found = weights.gradient()
    scales = weights.start.clone().requires_grad_(True)
    direct: dict[str, Tensor] = {}
    for g, (name, parts) in enumerate(_components(updates).items()):
        dense = [part.dense() if isinstance(part, LowRank) else part for part in parts]
        change = sum(scales[g, c].float() * value for c, value in enumerate(dense))
        direct[name] = model.weight(name).detach() + change
    run = Model(model.module, direct)
    _entropy(task, run).backward()
    assert scales.grad is not None
    assert (found - scales.grad).norm() <= 1e-4 * scales.grad.norm()


@pytest.mark.parametrize("form", ["dense", "factored", "per task"])
def test_learning_step(benchmark: Any, form: str) -> None:
    torch.manual_seed(0)
    module, tasks = _encoder(), _tasks()
    model, updates = Model(module), _updates(module, form)
    _check(model, updates, tasks)
    weights = ScaledUpdates(model, _components(updates), 0.3)
    rotate = form != "per task"  # AdaMerging has no rotations
    options = LearnOptions(rotate=rotate, alpha=0.8 if rotate else 0.0)
    run = Learner(model, weights, tasks, options, None)
    run.begin()

    def step() -> None:
        run.weights.set(run.scales)
        run.advance()

    def alone() -> None:
        for task in tasks:
            _entropy(task, weights.model).backward()
        for leaf in weights.model.weights.values():
            leaf.grad = None

    # Turn by turn and in processor time: what else runs on the machine must not decide the ratio.
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for call in (alone, step):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        ratios.append(times[1] / times[0])
    ratio = statistics.median(ratios)
    assert ratio <= LIMIT
    benchmark.group = "alignment step"
    benchmark.extra_info.update(case=form, ratio=ratio)
    print(f"{form}: {ratio:.2f} times forward and backward ({min(ratios):.2f} to {max(ratios):.2f})")
    benchmark.pedantic(step, rounds=3, iterations=1)
