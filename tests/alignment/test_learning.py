from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from alignment_problems import D, base, features, tasks, updates

from dirmerge.alignment import AlignmentTask, Head, LearnOptions, Model, adamerging, learn, read_features
from dirmerge.alignment.guard import read
from dirmerge.alignment.losses import alignment_loss, entropy, etf_targets, rotation_target
from dirmerge.errors import CheckpointError
from dirmerge.linalg import etf_gap, procrustes


def test_without_rates_it_is_the_plain_merge():
    """R_t = I and λ as given: the model is W_0 + λ D and the heads are those that came in."""
    model, merged, chosen = base(), updates(0), tasks()
    options = LearnOptions(steps=2, lr_scale=1e-30, lr_rotation=1e-30)
    found = learn(model, merged, chosen, options, scale=0.4)
    plain = model.updated(merged, 0.4)
    for name in merged:
        torch.testing.assert_close(found.model.weight(name), plain.weight(name), rtol=0, atol=1e-7)
    for task, head in zip(chosen, found.heads, strict=True):
        assert isinstance(head, Head)
        torch.testing.assert_close(head.weight, task.head.weight, rtol=0, atol=1e-6)
    assert found.stopped is None


def test_learning_lowers_the_loss_and_folds_the_rotation():
    model, merged, chosen = base(), updates(0), tasks()
    options = LearnOptions(steps=60, lr_rotation=1e-2, min_agreement=0, max_shift=1)
    found = learn(model, merged, chosen, options, scale=0.3)
    first, best = found.history[0], min(found.history, key=lambda reading: reading.loss)
    assert best.loss < first.loss - 0.05
    assert found.best_step == best.step > 0
    assert len({round(found.scales[name][0], 6) for name in merged}) == 3
    for task, head, matrix in zip(chosen, found.heads, found.matrices, strict=True):
        gram = matrix.double().T @ matrix.double()
        assert (gram - torch.eye(D, dtype=torch.float64)).norm() < 1e-5
        assert torch.linalg.det(matrix.double()) == pytest.approx(1, abs=1e-5)
        assert (matrix - torch.eye(D)).norm() > 0.1
        z = read_features(found.model, task)
        torch.testing.assert_close(head.logits(z), task.head.logits(z @ matrix), rtol=1e-4, atol=1e-4)


def test_rotation_gradient_direction():
    """One step follows the skew gradient of the whole loss, by finite differences in float64."""
    model, merged, chosen = base(torch.float64), updates(0, torch.float64), tasks(1, dtype=torch.float64)
    task, rate = chosen[0], 1e-6
    one = AlignmentTask(task.name, task.batches[:1], task.head, features)
    options = LearnOptions(steps=1, lr_rotation=rate, lr_scale=1e-12, watch=1, min_agreement=0, max_shift=1)
    found = learn(model, merged, [one], options, scale=0.5)
    assert found.best_step == 1
    moved = (found.matrices[0] - torch.eye(D, dtype=torch.float64)) / rate

    z = read_features(model.updated(merged, 0.5), one)
    targets = etf_targets(task.head, 3, D).double()
    predicted = task.head.logits(z).argmax(1)
    means = torch.stack(
        [z[predicted == c].mean(0) if bool((predicted == c).any()) else torch.zeros(D) for c in range(3)]
    )
    present = torch.bincount(predicted, minlength=3) > 0
    goal = rotation_target(means, targets, present, torch.eye(D, dtype=torch.float64))

    def loss(r):
        turned = z @ r
        value = entropy(task.head.logits(turned)) + 0.8 * alignment_loss(turned, targets, predicted)
        return float(value + 0.2 * (r - goal).square().sum() / D)

    step = 1e-5
    for i, j in ((0, 1), (2, 5), (3, 7)):
        plus, minus = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
        plus[i, j], plus[j, i] = step, -step
        minus = -plus
        slope = loss(torch.matrix_exp(plus)) - loss(torch.matrix_exp(minus))
        # Adam's first step is the sign of the gradient.
        assert float(moved[i, j]) == pytest.approx(-math.copysign(1, slope), abs=1e-3)


def test_a_large_rotation_rate_is_stopped_by_the_guard():
    """The collapse of the real tasks in small: the loss falls, the predictions go; the best state is kept."""
    model, merged, chosen = base(), updates(0), tasks(batches=8, size=32)
    wild: dict[str, Any] = {"steps": 200, "lr_rotation": 5e-2, "alpha": 0.0, "beta": 0.0, "watch": 4}
    free = learn(model, merged, chosen, LearnOptions(min_agreement=0, max_shift=1, **wild), scale=0.3)
    last = free.history[-1]
    assert last.loss < free.history[0].loss
    assert min(last.agreement) < 0.6  # without the guard it goes there
    held = learn(model, merged, chosen, LearnOptions(**wild), scale=0.3)
    assert held.stopped is not None
    assert "task task" in held.stopped
    assert "lower lr_rotation" in held.stopped
    assert held.steps < 200
    kept = next(reading for reading in held.history if reading.step == held.best_step)
    assert kept.within
    assert min(kept.agreement) >= 0.6
    assert not held.history[-1].within


def test_guard_sees_one_class_taking_over():
    start = [torch.tensor([0, 1] * 10)]
    reading = read(5, 0.1, start, [torch.zeros(20, dtype=torch.int64)], 0.4, 0.3)
    assert reading.agreement == (0.5,)
    assert reading.shift == (0.5,)
    assert not reading.within
    assert read(5, 0.1, start, start, 1.0, 0.0).within
    assert not read(5, float("nan"), start, start, 0.0, 1.0).within


def test_guard_weighs_what_the_fine_tunes_lost_against_what_they_gained():
    reference = [torch.zeros(100, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)]
    start = [reference[0].clone(), torch.ones(50, dtype=torch.int64)]

    def reading(lost, gained):
        now = [start[0].clone(), start[1].clone()]
        now[0][:lost] = 1
        now[1][:gained] = 0
        return read(1, 0.5, start, now, 0.0, 1.0, reference)

    assert reading(4, 0).within  # 4 ≤ 2 √4
    assert not reading(5, 0).within
    assert reading(20, 10).within  # 10 ≤ 2 √30
    assert not reading(30, 10).within
    assert reading(0, 50).within
    assert reading(10, 5).own == (0.9, 0.1)
    assert reading(10, 5).score == (0.5, -0.5)
    assert read(1, 0.5, start, start, 0.0, 1.0).own is None


def test_the_state_that_agrees_with_the_fine_tunes_is_kept():
    """A wild run's loss falls and falls; with the fine-tunes as judges the start is kept, and it stops."""
    model, merged, chosen = base(), updates(0), tasks(batches=8, size=32)
    wild = LearnOptions(
        steps=60, lr_rotation=5e-2, alpha=0.0, beta=0.0, min_agreement=0, max_shift=1, watch=8, check_every=5
    )
    free = learn(model, merged, chosen, wild, scale=0.3)
    assert free.best_step > 0
    assert free.stopped is None
    assert free.history[0].own is None
    start = model.updated(merged, 0.3)
    judged = learn(model, merged, chosen, wild, scale=0.3, own=(start for _ in chosen))
    assert judged.history[0].own == (1.0, 1.0)
    assert judged.best_step == 0
    assert judged.steps < 60
    assert "100.0 % at the start; lower lr_scale" in judged.stopped
    for name in merged:
        torch.testing.assert_close(judged.model.weight(name), start.weight(name), rtol=0, atol=1e-6)
    # With the run's own end as the judge, the last states are the better ones.
    ends = [Model(torch.nn.Sequential(Mapped(free.model, matrix)), {}) for matrix in free.matrices]
    towards = learn(model, merged, chosen, wild, scale=0.3, own=ends)
    assert towards.stopped is None
    assert towards.best_step == free.best_step
    best = next(reading for reading in towards.history if reading.step == towards.best_step)
    assert min(best.own) > 0.99 > max(towards.history[0].own)


class Mapped(torch.nn.Module):
    """A model with its features mapped."""

    def __init__(self, model, matrix):
        super().__init__()
        self.run, self.matrix = model, matrix

    def forward(self, x):
        return self.run(x) @ self.matrix


@pytest.mark.parametrize("count", [1, 3])
def test_one_fine_tune_per_task(count):
    model, merged, chosen = base(), updates(0), tasks()
    with pytest.raises(ValueError, match="own must have one fine-tune per task"):
        learn(model, merged, chosen, LearnOptions(steps=1), own=[model] * count)


def test_infinite_loss_stops_with_the_start():
    model, merged = base(), updates(0)

    calls = []

    def breaks(run, batch):
        calls.append(1)
        return run.run(batch) * (float("nan") if len(calls) > 20 else 1.0)

    chosen = [AlignmentTask(t.name, t.batches, t.head, breaks) for t in tasks(1)]
    found = learn(model, merged, chosen, LearnOptions(steps=50), scale=0.3)
    assert "not finite" in found.stopped
    assert all(bool(torch.isfinite(found.model.weight(name)).all()) for name in merged)


@pytest.mark.parametrize(("rotate", "judged"), [(True, False), (False, False), (True, True)])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, rotate, judged):
    model, merged, chosen = base(), updates(0, low_rank=True), tasks()
    own = [model.updated(merged, 0.5)] * 2 if judged else None
    options = LearnOptions(
        steps=20, check_every=5, refresh=4, lr_rotation=1e-3, rotate=rotate, alpha=0.8 * rotate
    )
    whole = learn(model, merged, chosen, options, scale=0.3, own=own)
    state = tmp_path / "state.safetensors"

    class StopError(Exception):
        pass

    def stop(progress):
        if progress.step == 12:
            raise StopError

    with pytest.raises(StopError):
        learn(model, merged, chosen, options, scale=0.3, own=own, state=state, progress=stop)
    steps = []
    resumed = learn(
        model,
        merged,
        chosen,
        options,
        scale=0.3,
        own=own,
        state=state,
        progress=lambda p: steps.append(p.step),
    )
    assert steps[0] == 11  # the last check before the interruption was at step 10
    assert resumed.scales == whole.scales
    assert resumed.history == whole.history
    assert resumed.best_step == whole.best_step
    for name in merged:
        assert torch.equal(resumed.model.weight(name), whole.model.weight(name))
    for left, right in zip(resumed.heads, whole.heads, strict=True):
        assert isinstance(left, Head)
        assert isinstance(right, Head)
        assert torch.equal(left.weight, right.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_foreign_or_damaged_state_is_refused(tmp_path):
    model, merged, chosen = base(), updates(0), tasks()
    state = tmp_path / "state.safetensors"
    options = LearnOptions(steps=2, check_every=1)
    learn(model, merged, chosen, options, scale=0.3, state=state)
    with pytest.raises(CheckpointError, match="state of another run"):
        learn(model, merged, chosen, options.model_copy(update={"alpha": 0.1}), scale=0.3, state=state)
    with pytest.raises(CheckpointError, match="state of another run"):
        learn(model, merged, chosen, options, scale=0.4, state=state)
    with pytest.raises(CheckpointError, match="state of another run"):
        learn(model, merged, chosen, options, scale=0.3, own=[model] * 2, state=state)
    side = state.with_suffix(".json")
    content = json.loads(side.read_text())
    side.write_text(json.dumps({**content, "stamp": "0"}))
    with pytest.raises(CheckpointError, match="not of one pair"):
        learn(model, merged, chosen, options, scale=0.3, state=state)
    side.write_text(json.dumps({**content, "history": [{"step": 1}]}))
    with pytest.raises(CheckpointError, match="no state of a run"):
        learn(model, merged, chosen, options, scale=0.3, state=state)
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        learn(model, merged, chosen, options, scale=0.3, state=state)


def test_longer_run_goes_on_from_a_finished_one(tmp_path):
    model, merged, chosen = base(), updates(0), tasks()
    state = tmp_path / "state.safetensors"
    short = LearnOptions(steps=10, check_every=5)
    learn(model, merged, chosen, short, scale=0.3, state=state)
    longer = short.model_copy(update={"steps": 20})
    resumed = learn(model, merged, chosen, longer, scale=0.3, state=state)
    assert resumed.scales == learn(model, merged, chosen, longer, scale=0.3).scales


def test_seed_changes_the_order_and_nothing_else_does():
    model, merged, chosen = base(), updates(0), tasks()
    runs = [learn(model, merged, chosen, LearnOptions(steps=9, seed=s), scale=0.3).scales for s in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_adamerging_minimises_entropy_alone():
    model, chosen = base(), tasks()
    deltas = {k: [updates(t)[k] for t in range(2)] for k in updates(0)}
    options = LearnOptions(steps=40, lr_scale=5e-2, min_agreement=0, max_shift=1, watch=4)
    layers = adamerging(model, deltas, chosen, options)
    assert all(len(values) == 2 for values in layers.scales.values())
    assert layers.matrices == [None, None]
    for head, task in zip(layers.heads, chosen, strict=True):
        assert isinstance(head, Head)
        assert head.weight is task.head.weight

    def loss(found):
        return sum(float(entropy(t.head.logits(read_features(found, t)))) for t in chosen)

    start = model.updated({k: sum(d) for k, d in deltas.items()}, 0.3)
    assert layers.history[0].loss == pytest.approx(loss_watched(start, chosen), rel=1e-5)
    assert loss(layers.model) < loss(start) - 0.05
    whole = adamerging(model, deltas, chosen, options.model_copy(update={"per": "model"}))
    assert len({tuple(values) for values in whole.scales.values()}) == 1
    values = next(iter(whole.scales.values()))
    assert values[0] != values[1]


def loss_watched(model, chosen):
    total = 0.0
    for task in chosen:
        watched = [task.batches[round(i * (len(task.batches) - 1) / 3)] for i in range(4)]
        z = read_features(model, AlignmentTask(task.name, watched, task.head, features))
        total += float(entropy(task.head.logits(z)))
    return total / len(chosen)


def test_targets():
    head = tasks(classes=5)[0].head
    targets = etf_targets(head, 5, D).double()
    assert etf_gap(targets.T) < 1e-6
    torch.testing.assert_close(targets.norm(dim=1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    centred = head.weight.double() - head.weight.double().mean(0)
    best = float((targets * centred).sum())
    for seed in range(20):  # no turned simplex is nearer to the head
        turn = torch.matrix_exp(
            0.1
            * (lambda a: a - a.T)(
                torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            )
        )
        assert float((targets @ turn * centred).sum()) <= best + 1e-9
    random = etf_targets(head, 5, D, mode="random", seed=3).double()
    assert etf_gap(random.T) < 1e-6
    assert float((random * centred).sum()) < best
    assert etf_targets(head, 5, D, mode="random", seed=4).double().sub(random).norm() > 0.1


def test_more_classes_than_a_simplex_holds():
    generator = torch.Generator().manual_seed(0)
    head = Head.of_class_vectors(torch.randn(D + 2, D, generator=generator))
    with pytest.raises(
        ValueError, match=rf"no simplex of {D + 2} classes exists in R\^{D}.*nearest_polar=True"
    ):
        etf_targets(head, D + 2, D)
    with pytest.raises(ValueError, match="targets=random"):
        etf_targets(head, D + 2, D, mode="random", nearest_polar=True)
    found = etf_targets(head, D + 2, D, nearest_polar=True)
    centred = head.weight - head.weight.mean(0)
    assert (torch.nn.functional.cosine_similarity(found, centred) > 0.5).all()
    shifted = etf_targets(Head(head.weight + 3.0), D + 2, D, nearest_polar=True)
    torch.testing.assert_close(shifted, found, rtol=0, atol=1e-4)  # what all classes share has no say
    largest = etf_targets(Head(head.weight[1:]), D + 1, D)
    assert etf_gap(largest.double().T) < 1e-6


def test_rotation_target_turns_class_means_and_little_else():
    generator = torch.Generator().manual_seed(0)
    targets = etf_targets(tasks(classes=3)[0].head, 3, D).double()
    turn = procrustes(
        torch.randn(20, D, generator=generator), torch.randn(20, D, generator=generator)
    ).double()
    means = 0.7 * targets @ turn.T + torch.randn(D, generator=generator).double()  # a common mean has no say
    eye, present = torch.eye(D, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    found = rotation_target(means, targets, present, eye)
    torch.testing.assert_close((means - means.mean(0)) @ found, 0.7 * targets, rtol=0, atol=5e-3)
    assert torch.linalg.det(found) == pytest.approx(1)
    some = torch.tensor([True, True, False])  # a class never predicted: what the others share has no say
    partial = [rotation_target(means + shift, targets, some, eye) for shift in (0.0, 50.0)]
    torch.testing.assert_close(*partial, rtol=0, atol=1e-8)
    # Any completion maps the means; the nearest one to R_0 leaves at least d − 4 directions alone.
    assert int((torch.linalg.svdvals(found - eye) < 1e-2).sum()) >= D - 4


@pytest.mark.parametrize("low_rank", [False, True])
def test_bfloat16_autocast_runs_the_model_narrow_and_everything_else_wide(low_rank):
    model, merged, chosen = base(), updates(0, low_rank=low_rank), tasks()
    seen = []
    handle = model.module.second.register_forward_hook(lambda _, x, y: seen.append((x[0].dtype, y.dtype)))
    options = LearnOptions(steps=40, lr_rotation=1e-2, min_agreement=0, max_shift=1, bf16=True)
    found = learn(model, merged, chosen, options, scale=0.3)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    handle.remove()
    best = min(found.history, key=lambda reading: reading.loss)
    assert best.loss < found.history[0].loss - 0.03
    for name in merged:
        assert found.model.weight(name).dtype == torch.float32
    for matrix in found.matrices:
        assert matrix.dtype == torch.float32
        gram = matrix.double().T @ matrix.double()
        assert (gram - torch.eye(D, dtype=torch.float64)).norm() < 1e-5
    # The same run in float32 goes the same way, up to the eight bits of bfloat16.
    wide = learn(model, merged, chosen, options.model_copy(update={"bf16": False}), scale=0.3)
    scales = [torch.tensor([run.scales[name][0] for name in merged]) for run in (found, wide)]
    assert (scales[0] - scales[1]).abs().max() < 0.05
    assert (scales[1] - 0.3).abs().max() > 0.1
    # Read without autocast, the features of the learned model are float32 ones.
    narrow, exact = (read_features(found.model, chosen[0], bf16=bf16) for bf16 in (True, False))
    assert narrow.dtype == exact.dtype == torch.float32
    assert 1e-4 < (narrow - exact).norm() / exact.norm() < 2e-2


def test_options_and_tasks_are_checked():
    model, merged, chosen = base(), updates(0), tasks()
    with pytest.raises(ValueError, match="different names"):
        learn(model, merged, [chosen[0], chosen[0]])
    with pytest.raises(ValueError, match="one matrix per task, got 1 for 2"):
        learn(model, merged, chosen, maps=[torch.eye(D)])
    with pytest.raises(ValueError, match=r"task task0: its map must have shape \(8, 8\), got \(3, 3\)"):
        learn(model, merged, chosen, maps=[torch.eye(3)] * 2)
    with pytest.raises(ValueError, match="parameters of the module, got 'third'"):
        Model(model.module, {"third": torch.zeros(1)})
    with pytest.raises(ValueError, match="lr_scale"):
        LearnOptions(lr_scale=0)
