from __future__ import annotations

import pytest
import torch
from alignment_problems import base, tasks, updates

from dirmerge.alignment.weights import ScaledUpdates, group_of
from dirmerge.deltas.lowrank import LowRank


def dense(update):
    return update.dense() if isinstance(update, LowRank) else update


def loss_of(model, chosen):
    return sum(
        task.head.logits(task.read(model, batch)).logsumexp(1).mean()
        for task in chosen
        for batch in task.batches[:2]
    )


@pytest.mark.parametrize("per", ["parameter", "block", "model"])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("low_rank", [False, True])
def test_gradient_is_autograds(per, components, low_rank):
    model, chosen = base(torch.float64), tasks(dtype=torch.float64)
    deltas = [updates(c, torch.float64, low_rank) for c in range(components)]
    weights = ScaledUpdates(model, {k: [d[k] for d in deltas] for k in deltas[0]}, 0.7, per)
    if low_rank and components == 1:
        assert weights._entries[0].dense is None  # stays factored
    for task in chosen:  # one backward pass per task, as in the learning
        loss_of(weights.model, [task]).backward()
    found = weights.gradient()

    scales = weights.start.clone().requires_grad_(True)
    own = dict(model.module.named_parameters())
    index = {name: weights.groups.index(group_of(name, per)) for name in deltas[0]}
    true = {
        name: own[name].detach()
        + sum(scales[index[name], c] * dense(deltas[c][name]) for c in range(components))
        for name in deltas[0]
    }

    class Direct:
        module, weights = model.module, true

        def run(self, batch):
            return torch.func.functional_call(model.module, true, (batch,))

    loss_of(Direct(), chosen).backward()
    torch.testing.assert_close(found, scales.grad, rtol=1e-10, atol=1e-12)
    assert bool((weights.gradient() == 0).all())  # the next step starts from nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_the_merged_ones(dtype):
    model = base(dtype)
    for low_rank in (False, True):
        merged = updates(1, torch.float32, low_rank)
        weights = ScaledUpdates(model, {k: [d] for k, d in merged.items()}, dict.fromkeys(merged, 0.5))
        weights.set(weights.start * 2)
        for name, update in merged.items():
            expected = (model.weight(name).double() + dense(update).double()).to(dtype)
            limit = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
            assert (weights.merged().weight(name) - expected).norm() <= limit * expected.norm()


def test_module_keeps_its_weights_and_gradients():
    model = base()
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    weights = ScaledUpdates(model, {k: [d] for k, d in updates(0).items()}, 1.0)
    loss_of(weights.model, tasks()).backward()
    for name, value in model.module.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_groups():
    name = "encoder.layer.3.output.dense.weight"
    assert group_of(name, "parameter") == name
    assert group_of(name, "block") == "encoder.layer.3"
    assert group_of("pooler.dense.weight", "block") == "pooler.dense.weight"
    assert group_of("blocks.11.attn.w2.weight", "block") == "blocks.11"
    assert group_of(name, "model") == ""


def test_errors():
    model, merged = base(), updates(0)
    with pytest.raises(ValueError, match=r"shares λ per model.*learn λ per parameter"):
        ScaledUpdates(
            model, {k: [d] for k, d in merged.items()}, {k: i + 1.0 for i, k in enumerate(merged)}, "model"
        )
    with pytest.raises(ValueError, match="same number of updates"):
        ScaledUpdates(model, {"first.weight": [merged["first.weight"]], "second.bias": []}, 1.0)
    with pytest.raises(ValueError, match=r"first.weight: updates must have the shape \(12, 6\), got \(8,\)"):
        ScaledUpdates(model, {"first.weight": [merged["second.bias"]]}, 1.0)
    with pytest.raises(ValueError, match="at least one parameter"):
        ScaledUpdates(model, {}, 1.0)
