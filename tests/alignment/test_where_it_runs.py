"""Where `align` runs its models, and how many of them are in memory."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch
import yaml
from alignment_models import recipe, write_models
from alignment_problems import base, features, tasks
from safetensors.torch import save_file
from typer.testing import CliRunner

import dirmerge
from dirmerge.alignment import AlignmentTask, CallableHead, Head, Model, write_head
from dirmerge.alignment.sources import TaskSource
from dirmerge.alignment.stored import fill
from dirmerge.cli import app
from dirmerge.engine import pipeline
from dirmerge.errors import RecipeError

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")
WIDTH = 128


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, WIDTH)
    for name in "xy":
        (folder / name).mkdir()
        prefix = "base_model.model.encoder.layer.1.attention.self.value"
        tensors = {
            f"{prefix}.lora_A.weight": torch.ones(2, WIDTH),
            f"{prefix}.lora_B.weight": torch.ones(WIDTH, 2),
        }
        save_file(tensors, folder / name / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["value"], "bias": "none"}
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
    write_head(folder, "head", Head.of_class_vectors(torch.randn(4, WIDTH), 20.0))
    return folder


def live_bytes() -> int:
    """Bytes of all float32 tensors that exist, their gradients included; shared memory counts once."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and (tensor.dtype, tensor.layout) == (torch.float32, torch.strided):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def few_inputs(models, **section: Any) -> dict[str, Any]:
    plain: dict[str, Any] = yaml.safe_load(recipe(models, **section).read_text())
    plain["merge_method"] = "task_arithmetic"
    plain["align"] |= {"inputs": 4, "batch_size": 4}
    if section["method"] in ("learned", "adamerging"):
        plain["align"]["learn"] = {"steps": 1, "watch": 1, "rotate": False, "alpha": 0}
    return plain


def adapters(models) -> dict[str, Any]:
    plain = few_inputs(models, method="ridge")
    plain["models"] = [{"model": str(models / name)} for name in "xy"]
    head = str(models / "head.safetensors")
    plain["align"]["tasks"] = [task | {"head": head} for task in plain["align"]["tasks"]]
    return plain


# The closed forms need one module, which is the fine-tune, the base and the merged model in turn. The learned
# forms need the base, the updates of each component, the merged weights, and their gradient or a fine-tune.
@pytest.mark.parametrize(
    ("method", "most"), [("rotation", 1), ("adapters", 1), ("learned", 4), ("adamerging", 5)]
)
def test_no_second_copy_of_a_model_is_in_memory(models, tmp_path, monkeypatch, method, most):
    plain = adapters(models) if method == "adapters" else few_inputs(models, method=method)
    base_model = transformers.AutoModel.from_pretrained(models / "base")
    size = sum(parameter.numel() for parameter in base_model.parameters())
    del base_model
    gc.collect()
    before, seen, run, make = live_bytes(), [], Model.run, TaskSource.module

    def counted(self: Model, batch: Any) -> Any:
        seen.append(live_bytes() - before)
        return run(self, batch)

    def counted_module(self: TaskSource, *arguments: Any, **options: Any) -> torch.nn.Module:
        module = make(self, *arguments, **options)
        seen.append(live_bytes() - before)
        return module

    monkeypatch.setattr(Model, "run", counted)
    monkeypatch.setattr(TaskSource, "module", counted_module)
    dirmerge.align(plain, tmp_path / "out")
    assert most - 0.2 < max(seen) / (4 * size) < most + 0.4
    assert not (tmp_path / "out" / "start").exists()


def test_threads_and_memory_reach_the_merge_and_the_models(models, tmp_path, monkeypatch):
    merges, threads, run, model_run = [], set(), pipeline.run, Model.run

    def merged(*arguments: Any, **options: Any) -> Any:
        merges.append(options["compute"])
        return run(*arguments, **options)

    def counted(self: Model, batch: Any) -> Any:
        threads.add(torch.get_num_threads())
        return model_run(self, batch)

    monkeypatch.setattr(pipeline, "run", merged)
    monkeypatch.setattr(Model, "run", counted)
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(few_inputs(models, method="learned")))
        options = ["--device", "cpu", "--threads", "1", "--memory", "30GB"]
        done = CliRunner().invoke(app, ["align", str(path), "--out", str(tmp_path / "out"), *options])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)
    assert done.exit_code == 0, done.output
    assert [(c.threads, c.memory, c.on_cpu) for c in merges] == [(1, 30_000_000_000, True)] * 2
    assert threads == {1}
    ran = {"devices": ["cpu"], "reason": "asked for", "threads": 1, "memory": 30_000_000_000}
    assert json.loads((tmp_path / "out" / "dirmerge.json").read_text())["align"]["compute"] == ran
    text = "cpu (asked for), 1 threads, at most 30.00 GB"
    assert f"models   ran on {text}" in done.stdout
    assert f"The models ran on {text}." in (tmp_path / "out" / "README.md").read_text()


def test_too_little_memory_is_refused(models, tmp_path):
    with pytest.raises(RecipeError, match="a memory of 1000000 bytes is too small"):
        dirmerge.align(few_inputs(models, method="rotation"), tmp_path / "out", memory="1MB")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(models, tmp_path):
    message = "device 'cuda' was asked for, but torch sees no CUDA device"
    with pytest.raises(ValueError, match=message):
        dirmerge.align(few_inputs(models, method="rotation"), tmp_path / "out", device="cuda")
    command = ["align", str(recipe(models)), "--out", str(tmp_path / "out"), "--device", "cuda"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_batches_and_maps_go_where_the_model_is():
    """Tensors on the meta device hold nothing, and say where they are."""
    model, meta = base(), torch.device("meta")
    model.module.to(meta)
    task = tasks()[0]
    assert task.read(model, task.batch_list()[0]).device == meta
    batch = {"x": task.batch_list()[0]}
    keyed = AlignmentTask("keyed", [batch], task.head, features)
    assert keyed.read(model, batch).device == meta
    assert batch["x"].device.type == "cpu"  # the caller's batch stays
    assert CallableHead(torch.sign, torch.eye(2)).on(meta).matrix.device == meta
    assert CallableHead(torch.sign).on(meta).matrix is None


def test_fill_rounds_to_the_module_and_refuses_other_shapes():
    module = torch.nn.Linear(3, 2).to(torch.bfloat16)
    exact = torch.randn(2, 3, dtype=torch.float64)
    fill(module, {"w": "weight"}, {"w": exact}.__getitem__)
    assert torch.equal(module.weight, exact.to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"w must have the module's shape \(2, 3\), got \(1, 3\)"):
        fill(module, {"w": "weight"}, {"w": exact[:1]}.__getitem__)  # copy_ alone would broadcast it


@pytest.mark.parametrize("method", ["rotation", "ridge"])
def test_closed_forms_on_a_device(shadow_gpu, models, tmp_path, method):
    """The whole of `align` on the shadow GPU: merge, features and maps."""
    rule = few_inputs(models, method=method)
    expected = dirmerge.align(rule, tmp_path / "cpu", device="cpu")
    with shadow_gpu() as gpu:
        found = dirmerge.align(rule, tmp_path / "gpu", device="cuda")
    assert found.compute["devices"] == ["cuda:0 (shadow)"]
    assert any(launch.flops for launch in gpu.launches if "alignment" in launch.where)
    assert found.fits is not None
    assert expected.fits is not None
    for mine, theirs in zip(found.fits, expected.fits, strict=True):
        # Few inputs leave directions of a rotation free, which rounding chooses: the map is not compared.
        assert mine.plain.agreement == theirs.plain.agreement
        assert mine.plain.distance == pytest.approx(theirs.plain.distance, rel=1e-5)
        assert mine.matrix.device.type == "cpu"
    for name, head in found.heads.items():
        assert isinstance(head, Head), name
        assert head.weight.device.type == "cpu"
