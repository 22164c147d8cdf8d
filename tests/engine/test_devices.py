"""The device path on the shadow GPU: results, bytes, waits, memory, stream order, several GPUs."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_adapter_folder, write_model
from safetensors.torch import load_file
from shadow import RaceError, tensor

from dirmerge import api
from dirmerge.engine import compute, lanes, work
from dirmerge.engine.workers import Workers
from dirmerge.errors import NonFiniteError, RecipeError
from dirmerge.methods import METHODS, registry

SHAPES = {
    "layers.0.attn.q_proj": (64, 64),
    "layers.0.mlp.up_proj": (96, 64),
    "layers.1.attn.q_proj": (64, 64),
    "layers.1.mlp.down_proj": (64, 96),
}
KINDS = ["full", "adapters", "adapter out"]
# Methods whose update of adapters has no factors.
DENSE = ["ties", "wudi"]


def state(seed, base=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (128, 64),
        **{f"{m}.weight": s for m, s in SHAPES.items()},
        "norm.weight": (64,),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if base is not None:
        made = {name: base[name].float() + 0.05 * value for name, value in made.items()}
    return {name: value.bfloat16() for name, value in made.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders base, m0, m1, m2 of a small model in bf16, and a0, a1, a2 of adapters."""
    root = tmp_path_factory.mktemp("models")
    base = state(0)
    write_model(root / "base", base)
    for t in range(3):
        write_model(root / f"m{t}", state(t + 1, base))
        write_adapter_folder(root / f"a{t}", SHAPES, rank=4, seed=t, dtype=torch.bfloat16)
    return root


def recipe(folders, method, kind, **keys):
    prefix = "m" if kind == "full" else "a"
    models = [{"model": str(folders / f"{prefix}{t}")} for t in range(3)]
    return {"merge_method": method, "base_model": str(folders / "base"), "models": models, **keys}


def merged(folders, out, method, kind, device, **keys):
    given: dict[str, Any] = {name: keys.pop(name) for name in ("memory", "threads") if name in keys}
    if kind == "adapter out":
        given |= {"as_adapter": True, "rank": 12 if method in DENSE else None}
    result = api.merge(recipe(folders, method, kind, **keys), out, overwrite=True, device=device, **given)
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(out).glob("*.safetensors")):
        found |= load_file(file)
    return result, found


def tensor_bytes(path):
    return sum(
        value.nbytes for file in sorted(path.glob("*.safetensors")) for value in load_file(file).values()
    )


def products(state):
    """An adapter's factors multiplied out: they are unique up to a rotation alone."""
    return {
        name: state[name.replace("lora_A", "lora_B")].float() @ value.float() if "lora_A" in name else value
        for name, value in state.items()
        if "lora_B" not in name
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    found, expected = products(found), products(expected)
    for name, value in expected.items():
        if "lora" in name:
            # Both factors are rounded to bf16, and not the same ones.
            assert float((found[name] - value).norm()) < 2**-6 * float(value.norm())
        else:
            # One unit in the last place of bf16, where the device rounds the other way.
            torch.testing.assert_close(found[name], value, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_on_a_device(shadow_gpu, folders, tmp_path, method, kind):
    _, expected = merged(folders, tmp_path / "cpu", method, kind, "cpu")
    with shadow_gpu() as gpu:
        result, found = merged(folders, tmp_path / "gpu", method, kind, "cuda")
    assert_equal(found, expected)
    assert result.compute["devices"] == ["cuda:0 (shadow)"]
    manifest = json.loads((tmp_path / "gpu" / "dirmerge.json").read_text())
    assert manifest["compute"] == result.compute

    inputs = [folders / f"{'m' if kind == 'full' else 'a'}{t}" for t in range(3)]
    base = tensor_bytes(folders / "base")
    bytes_in = sum(tensor_bytes(path) for path in inputs)
    if kind == "full":
        # Where λ follows from an alignment, the base is read a second time, once λ is known.
        bytes_in += base
        if METHODS[method].default_scale(False, 3).alignment is not None:
            bytes_in += sum(64 * 96 * 2 if "mlp" in m else 64 * 64 * 2 for m in SHAPES)
    elif kind == "adapters":
        bytes_in += base
    assert gpu.bytes_in == pytest.approx(bytes_in, rel=0.02)
    assert gpu.bytes_out == pytest.approx(tensor_bytes(tmp_path / "gpu"), rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_host_waits_at_most_four_times_per_matrix(shadow_gpu, folders, tmp_path, method, kind):
    with shadow_gpu() as gpu:
        merged(folders, tmp_path / "gpu", method, kind, "cuda")
    assert sum(gpu.syncs.values()) <= 4 * len(SHAPES), gpu.syncs
    # Besides, CUDA's torch reads the success of every eigh and svd; of three tasks that many per matrix.
    assert gpu.solver_waits <= (9 if method == "iso_cts" else 6) * len(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_large_factorisation(shadow_gpu, folders, tmp_path, method, kind):
    """Of adapters nothing wider than the ranks together, of full fine-tunes nothing wider than a matrix."""
    with shadow_gpu() as gpu:
        merged(folders, tmp_path / "gpu", method, kind, "cuda")
    narrow = kind != "full" and method not in DENSE
    assert gpu.largest_factorisation <= (3 * 4 if narrow else 96)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_without_values_the_same_is_launched(shadow_gpu, folders, tmp_path, monkeypatch, method, kind):
    monkeypatch.setattr(tensor, "kernel_of", lambda *_: None)
    logs = []
    for values in (True, False):
        with shadow_gpu(values=values) as gpu:
            merged(folders, tmp_path / "gpu", method, kind, "cuda")
        # A λ without a value is 1, by which nothing is multiplied.
        scaling = [x for x in gpu.launches if x.op == "mul" and x.where.startswith("deltas/lowrank.py")]
        launches = Counter(gpu.launches) - Counter(scaling)
        logs.append((launches, gpu.syncs, gpu.bytes_in, gpu.bytes_out))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", ["ties", "dc_merge"])
@pytest.mark.parametrize("seed", range(20))
def test_no_race_under_shuffled_delays(shadow_gpu, folders, tmp_path, method, seed):
    _, expected = merged(folders, tmp_path / "cpu", method, "full", "cpu")
    with shadow_gpu(schedule=seed):
        _, found = merged(folders, tmp_path / "gpu", method, "full", "cuda")
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["task_arithmetic", "dc_merge"])
def test_several_devices_share_the_work(shadow_gpu, folders, tmp_path, method, kind):
    with shadow_gpu() as one:
        _, expected = merged(folders, tmp_path / "one", method, kind, "cuda")
    with shadow_gpu(devices=2, schedule=3) as two:
        result, found = merged(folders, tmp_path / "two", method, kind, "cuda:0,cuda:1")
    assert result.compute["devices"] == ["cuda:0 (shadow)", "cuda:1 (shadow)"]
    assert all(torch.equal(found[name], value) for name, value in expected.items()), "not a bit may differ"
    assert two.bytes_in == one.bytes_in
    assert two.bytes_out == one.bytes_out
    shares = Counter(launch.device for launch in two.launches)
    assert min(shares[0], shares[1]) > 0.2 * sum(shares.values())


def test_empty_tensors_and_scalars_on_a_device(shadow_gpu, tmp_path):
    tensors = {"a": torch.zeros(0, 3), "b": torch.ones(()), "c": torch.zeros(4, 0), "d": torch.ones(2)}
    models = [{name: value + t for name, value in tensors.items()} for t in range(3)]
    for t, made in enumerate(models):
        write_model(tmp_path / f"m{t}", made)
    entries = [{"model": str(tmp_path / f"m{t}")} for t in (1, 2)]
    rule = {"merge_method": "average", "base_model": str(tmp_path / "m0"), "models": entries}
    with shadow_gpu():
        found = api.merge(rule, device="cuda").state_dict
    assert all(torch.equal(found[name], value + 1.5) for name, value in tensors.items())


def test_auto_takes_every_device_and_says_so(shadow_gpu, folders, tmp_path):
    with shadow_gpu(devices=2):
        result, _ = merged(folders, tmp_path / "out", "average", "full", "auto")
    assert result.compute["devices"] == ["cuda:0 (shadow)", "cuda:1 (shadow)"]
    assert "auto" in result.compute["reason"]
    assert "cuda:0 (shadow), cuda:1 (shadow) (auto" in result.summary()


def test_nan_on_a_device_names_file_and_tensor_and_leaves_nothing(shadow_gpu, folders, tmp_path):
    base = {name: value.clone() for name, value in load_file(folders / "base" / "model.safetensors").items()}
    for method, name in (("task_arithmetic", "norm.weight"), ("dc_merge", "layers.0.attn.q_proj.weight")):
        broken = {**state(1, base)}
        broken[name] = broken[name].clone()
        broken[name].view(-1)[3] = torch.nan
        write_model(tmp_path / "broken", broken)
        rule = recipe(folders, method, "full")
        rule["models"][1]["model"] = str(tmp_path / "broken")
        with (
            shadow_gpu(),
            pytest.raises(NonFiniteError, match=rf"broken/model\.safetensors: tensor '{name}'"),
        ):
            api.merge(rule, tmp_path / "out", device="cuda")
        assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_the_workers_are_asked_outside_the_lock_of_a_lane(shadow_gpu, folders, tmp_path, monkeypatch):
    """Whoever stops the workers holds their lock and asks for the lane's: the other way round hangs."""
    made, free = [], []
    begin, check = lanes.DeviceLane.begin, Workers.check

    def note(lane, items):
        made.append(lane)
        begin(lane, items)

    def is_free(lane):
        if lane._change.acquire(timeout=1):
            lane._change.release()
            free.append(True)
        else:
            free.append(False)

    def checked(workers):
        thread = threading.Thread(target=is_free, args=(made[-1],))
        thread.start()
        thread.join()
        check(workers)

    monkeypatch.setattr(lanes.DeviceLane, "begin", note)
    monkeypatch.setattr(Workers, "check", checked)
    with shadow_gpu():
        merged(folders, tmp_path / "out", "average", "full", "cuda")
    assert len(free) > 5
    assert all(free)


class TestBrokenPipelines:
    """Every guarantee is broken once on purpose, and seen."""

    def test_a_missing_wait(self, shadow_gpu, folders, tmp_path, monkeypatch):
        def take(lane, job):
            with lane._change:
                while id(job) not in lane._staged:
                    lane._change.wait()
                tensors, _ = lane._staged.pop(id(job))
                lane._held -= job.nbytes
            return tensors

        monkeypatch.setattr(lanes.DeviceLane, "take", take)
        with pytest.raises(RaceError, match="without waiting"), shadow_gpu():
            merged(folders, tmp_path / "out", "task_arithmetic", "full", "cuda")

    def test_a_missing_record(self, shadow_gpu, folders, tmp_path, monkeypatch):
        from shadow.tensor import ShadowTensor

        monkeypatch.setattr(ShadowTensor, "record_stream", lambda *_: None)
        with pytest.raises(RaceError, match="without record_stream"), shadow_gpu():
            merged(folders, tmp_path / "out", "task_arithmetic", "full", "cuda")

    def test_a_result_that_is_not_waited_for(self, shadow_gpu, folders, tmp_path, monkeypatch):
        """The poison in it is seen: also the count of what is not finite is poison, and not 0."""
        from shadow.streams import Event

        monkeypatch.setattr(Event, "synchronize", lambda event: None)
        with pytest.raises(NonFiniteError, match="the merged tensor is not finite"), shadow_gpu():
            merged(folders, tmp_path / "gpu", "task_arithmetic", "full", "cuda")

    def test_a_second_copy_of_the_inputs(self, shadow_gpu, folders, tmp_path, monkeypatch):
        stage = lanes.DeviceLane._stage

        def twice(lane, job):
            for value in lane._workers.result(job):
                value.to(lane.device, non_blocking=True)
            stage(lane, job)

        monkeypatch.setattr(lanes.DeviceLane, "_stage", twice)
        with pytest.raises(AssertionError):
            test_every_method_on_a_device(shadow_gpu, folders, tmp_path, "ties", "full")

    def test_a_wait_per_task(self, shadow_gpu, folders, tmp_path, monkeypatch):
        merge = registry.merge_tasks

        def waiting(tasks, *arguments):
            for _ in range(5):
                torch.cuda.synchronize()
            return merge(tasks, *arguments)

        monkeypatch.setattr(work, "merge_tasks", waiting)
        with pytest.raises(AssertionError, match=r"cuda\.synchronize"):
            test_the_host_waits_at_most_four_times_per_matrix(shadow_gpu, folders, tmp_path, "tsv_m", "full")

    def test_memory_that_is_held_too_long(self, shadow_gpu, large, tmp_path, monkeypatch):
        held = []
        take = lanes.DeviceLane.take

        def keep(lane, job):
            held.append(take(lane, job))
            return held[-1]

        monkeypatch.setattr(lanes.DeviceLane, "take", keep)
        arguments = shadow_gpu, large, tmp_path, monkeypatch, "task_arithmetic", 130 << 20
        with pytest.raises(AssertionError):
            test_peak_is_within_the_memory_allowed(*arguments)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same with an embedding of 32 MB: the inputs together have 140 MB."""
    root = tmp_path_factory.mktemp("large")
    wide = torch.randn(1 << 15, 512)
    for t, name in enumerate(("base", "m0", "m1", "m2")):
        made = {"embed_tokens.weight": (wide + 0.01 * t).bfloat16()}
        made |= {f"layers.{i}.mlp.up_proj.weight": torch.randn(256, 512).bfloat16() for i in range(6)}
        write_model(root / name, made)
    return root


@pytest.mark.parametrize("memory", [130 << 20, 160 << 20, 400 << 20])
@pytest.mark.parametrize("method", ["task_arithmetic", "dc_merge"])
def test_peak_is_within_the_memory_allowed(shadow_gpu, large, tmp_path, monkeypatch, method, memory):
    # What the test process holds is not the merge's.
    monkeypatch.setattr(compute, "resident_bytes", lambda: 0)
    _, expected = merged(large, tmp_path / "cpu", method, "full", "cpu")
    with shadow_gpu() as gpu:
        _, found = merged(large, tmp_path / "gpu", method, "full", "cuda", memory=memory)
    assert_equal(found, expected)
    assert gpu.peak_bytes <= memory


def test_too_little_memory_is_refused_with_what_is_enough(folders):
    with pytest.raises(RecipeError, match=r"memory of 1000000 bytes is too small: .* needs at least (\d+)"):
        api.merge(recipe(folders, "tsv_m", "full"), memory="1MB")


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "wudi", "ties", "dc_merge"])
def test_large_matrices_keep_the_promises(shadow_gpu, tmp_path, method):
    """Without values, at full size: more than is read ahead, and still once over the bus and one wait."""
    from benchmarks.launches import record

    log = record(method, 4096, 4096, 8, adapters=False)
    assert log.syncs <= 4
    passes = 2 if METHODS[method].default_scale(False, 8).alignment is not None else 1
    assert log.bytes_in == pytest.approx((8 + passes) * 4096 * 4096 * 2, rel=0.02)
