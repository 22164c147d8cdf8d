from __future__ import annotations

import json

import pytest
import torch
from alignment_problems import D, base, features, tasks, updates
from helpers import safetensors_bytes

from dirmerge.alignment import (
    AlignmentTask,
    CallableHead,
    Head,
    Model,
    closed_form,
    feature_map,
    read_features,
    read_head,
    read_heads,
    ridge_map,
    write_head,
)
from dirmerge.errors import CheckpointError, OutputError
from dirmerge.linalg import procrustes


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalise", [False, True])
def test_folded_head_equals_mapped_features(normalise):
    head = Head(random(5, D), random(5, seed=1), 3.0, normalise)
    z, matrix = random(40, D, seed=2), random(D, D, seed=3)
    expected = head.logits(head.prepare(z) @ matrix)
    torch.testing.assert_close(head.folded(matrix)(z), expected, rtol=1e-4, atol=1e-4)
    function = CallableHead(lambda x: head.logits(x))
    torch.testing.assert_close(function.folded(matrix)(z), head.logits(z @ matrix), rtol=1e-5, atol=1e-5)
    twice = function.folded(matrix).folded(random(D, D, seed=4))
    torch.testing.assert_close(twice(z), head.logits(z @ random(D, D, seed=4) @ matrix), rtol=1e-4, atol=1e-3)


def test_ridge_map_solves_its_problem():
    a, b = random(100, D).double(), random(100, D, seed=1).double()
    r, level = procrustes(a, b), 0.3 * float((a * a).sum()) / D
    found = ridge_map(a, b, 0.3)
    # The minimum of ‖A M − B‖² + l ‖M − R‖²: its gradient is zero there.
    gradient = a.T @ (a @ found - b) + level * (found - r)
    assert gradient.norm() < 1e-9 * (a.T @ b).norm()
    assert (ridge_map(a, b, 1e9) - r).norm() < 1e-6
    least = torch.linalg.lstsq(a, b).solution
    assert (ridge_map(a, b, 1e-9) - least).norm() < 1e-6
    scaled = ridge_map(5 * a, 5 * b, 0.3)
    torch.testing.assert_close(scaled, found)  # the ridge follows the size of the features
    assert torch.equal(feature_map(a, b, "rotation"), r)
    with pytest.raises(ValueError, match="ridge must be positive"):
        ridge_map(a, b, 0.0)


@pytest.mark.parametrize("kind", ["rotation", "ridge"])
def test_closed_form_finds_the_turn_of_a_fine_tune(kind):
    """The merged model is the fine-tune with turned features: a rotation brings all of it back."""
    model, chosen = base(), tasks(batches=10)
    turn = procrustes(random(30, D), random(30, D, seed=1))
    weights = dict(model.module.named_parameters())
    turned = Model(
        model.module,
        {
            "second.weight": (turn.T @ weights["second.weight"]).detach(),
            "second.bias": (turn.T @ weights["second.bias"]).detach(),
        },
    )
    far = model.updated(updates(0), 3.0)
    found = closed_form(turned, chosen, [model, model], base=far, kind=kind)
    alone = closed_form(far, chosen, [model, model], kind=kind)
    assert [fit.control for fit in found] == [fit.aligned for fit in alone]
    for task, fit in zip(chosen, found, strict=True):
        torch.testing.assert_close(fit.matrix, turn.T, rtol=0, atol=2e-5)
        assert fit.aligned.agreement == 1
        assert fit.aligned.distance < 1e-4 < fit.plain.distance
        assert fit.plain.agreement < 1
        assert fit.control.distance > 0.05
        assert (fit.inputs, fit.held_out) == (160, 32)
        logits = task.head.logits(read_features(model, task))
        torch.testing.assert_close(fit.head.logits(read_features(turned, task)), logits, rtol=0, atol=1e-3)
    given = closed_form(turned, chosen, (read_features(model, task) for task in chosen), kind=kind)
    assert torch.equal(given[0].matrix, found[0].matrix)
    assert given[0].control is None
    with pytest.raises(ValueError, match="none is left for task1"):
        closed_form(turned, chosen, [model])
    with pytest.raises(ValueError, match="got more than 2"):
        closed_form(turned, chosen, [model] * 3)


def test_batches_may_be_an_iterator_and_features_are_checked():
    data = tasks(1)[0]
    task = AlignmentTask("once", iter(data.batches), data.head, features)
    first = read_features(base(), task)
    assert torch.equal(read_features(base(), task), first)
    with pytest.raises(ValueError, match="task empty: batches must not be empty"):
        AlignmentTask("empty", [], data.head, features)
    with pytest.raises(ValueError, match=r"task bad: features must be a floating tensor \(n, d\)"):
        read_features(base(), AlignmentTask("bad", data.batches, data.head, lambda m, b: m.run(b)[0]))
    with pytest.raises(ValueError, match="task nan: features must be finite"):
        read_features(
            base(), AlignmentTask("nan", data.batches, data.head, lambda m, b: m.run(b) * float("nan"))
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_survive_their_files(tmp_path, dtype):
    head = Head(random(3, D).to(dtype), random(3, seed=1).to(dtype), 2.5, True, ("a", "b", "ü"))
    write_head(tmp_path / "heads", "one", head, {"inputs": 12})
    write_head(tmp_path / "heads", "two", Head(random(4, D)))
    write_head(tmp_path / "heads", "three", CallableHead(torch.sin, random(D, D)))
    stored = read_heads(tmp_path)  # the folder of the merged model
    assert list(stored) == ["one", "three", "two"]
    found = stored["one"].head
    assert torch.equal(found.weight, head.weight)
    assert torch.equal(found.bias, head.bias)
    assert (found.scale, found.normalise, found.labels) == (2.5, True, ("a", "b", "ü"))
    assert stored["one"].info == {"inputs": 12}
    assert stored["two"].head.bias is None
    assert stored["three"].head is None
    assert torch.equal(stored["three"].matrix, random(D, D))
    with pytest.raises(OutputError, match="exists"):
        write_head(tmp_path / "heads", "one", head)
    write_head(tmp_path / "heads", "one", Head(random(2, D)), overwrite=True)
    assert read_head(tmp_path / "heads" / "one.safetensors").head.classes == 2
    assert not [path for path in (tmp_path / "heads").iterdir() if path.name.startswith(".")]
    for name in ("../x", "a/b", "", ".x"):
        with pytest.raises(ValueError, match="a task's name is its file's"):
            write_head(tmp_path, name, head)


def test_hostile_heads_are_refused(tmp_path):
    path = write_head(tmp_path, "task", Head(random(3, D)))
    side = path.with_suffix(".json")
    good, content = path.read_bytes(), json.loads(side.read_text())

    def refused(match, data=good, **change):
        path.write_bytes(data)
        side.write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=match):
            read_head(path)

    refused("not of one pair", stamp="other")
    refused("version must be 1", version=2)
    refused("must name its task", task="../../etc/passwd")
    refused("needs a number `scale`", scale=True)
    refused("needs a number `scale`", labels=[1])
    refused("labels must name 3 classes", labels=["a"])
    refused("must hold a head", kind="map")
    refused(r"task\.safetensors", good[:-4])
    stamp = {"__metadata__": {"stamp": content["stamp"]}}

    def file(name="weight", dtype="F32", shape=(1, 2), data=b"\x00" * 8):
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}
        return safetensors_bytes({**stamp, name: entry}, data)

    refused("tensor 'weight' holds NaN or Inf", file(data=b"\xff" * 8))
    refused("tensor 'weight' must be a floating tensor", file(dtype="I32"))
    refused("must be a floating matrix", file(shape=(2,)))
    refused("must hold a head", file("other"))
    refused("needs 4611686018427387904 bytes|claims", file(shape=(2**30, 2**30)))
    refused("claims a header", safetensors_bytes(b"{}", length=2**62))
    side.write_text("[" * 10)
    path.write_bytes(good)
    with pytest.raises(CheckpointError, match="malformed JSON"):
        read_head(path)
    side.unlink()
    with pytest.raises(CheckpointError, match=r"task\.json"):
        read_head(path)
    with pytest.raises(CheckpointError, match="holds no heads"):
        read_heads(tmp_path)
