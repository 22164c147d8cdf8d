"""`dirmerge align` on tiny BERT classifiers, from files to files."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
import yaml
from alignment_models import D, recipe, write_models
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dirmerge
from dirmerge.alignment import Head, read_heads, write_head
from dirmerge.cli import app
from dirmerge.errors import CheckpointError, MismatchError, RecipeError

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def classify(folder, name, models, texts):
    """What transformers and the written files alone give: the backbone as a BertModel, the head on it."""
    backbone = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "base")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return read_heads(folder)[name].head(backbone(**batch).pooler_output)


TEXTS = ["w1 w2 w3", "w9 w8 w30 w31 w4", "w39", "w5 w6 w7 w8 w9 w10 w11"] * 6


@pytest.mark.parametrize("method", ["rotation", "ridge"])
def test_align_writes_a_backbone_and_heads(models, tmp_path, method):
    done = CliRunner().invoke(
        app, ["align", str(recipe(models, method=method)), "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "base aligned (control)" in done.stdout
    out = tmp_path / "out"
    dirmerge.merge({**yaml.safe_load((models / "recipe.yml").read_text()),
                    "tensors": [{"match": "classifier.*", "rule": "drop"}]}, tmp_path / "plain")  # fmt: skip
    merged, plain = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "plain"))
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], plain[name]) for name in merged)
    manifest = json.loads((out / "dirmerge.json").read_text())["align"]
    assert manifest["tasks"].keys() == {"first", "second"}
    for name, source in (("first", "a"), ("second", "b")):
        fit = manifest["tasks"][name]
        assert (fit["inputs"], fit["held_out"]) == (80, 16)
        assert fit["aligned"]["distance"] < fit["plain"]["distance"]
        assert 0 < fit["control"]["distance"] != fit["aligned"]["distance"]
        own = transformers.BertForSequenceClassification.from_pretrained(models / source).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(models / "base")
        with torch.no_grad():
            expected = own(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        found = classify(out, name, models, TEXTS)
        unaligned = Head.of_linear(own.classifier)
        backbone = transformers.BertModel.from_pretrained(out).eval()
        with torch.no_grad():
            batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
            before = unaligned(backbone(**batch).pooler_output)
        assert (found - expected).norm() < (before - expected).norm()  # texts that the map has not seen
    assert "| first |" in (out / "README.md").read_text()


def test_learned_backbone_has_the_learned_scales(models, tmp_path):
    path = recipe(
        models,
        method="learned",
        learn={"steps": 6, "check_every": 2, "lr_scale": 0.05, "min_agreement": 0, "max_shift": 1},
    )
    seen = []
    result = dirmerge.align(
        path, tmp_path / "out", state=tmp_path / "state.safetensors", progress=lambda p: seen.append(p.phase)
    )
    assert {"merge", "features", "learn"} <= set(seen)
    assert result.learned.steps == 6
    assert result.fits[0].control is not None
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in written.items():
        inner = f"bert.{name}"
        if inner in result.learned.scales:
            torch.testing.assert_close(value, result.learned.model.weight(inner), rtol=0, atol=2e-6)
    # λ itself: W − W_0 is λ D with the D of the plain merge.
    plain = dirmerge.merge({**yaml.safe_load(path.read_text()), "align": None,
                            "tensors": [{"match": "classifier.*", "rule": "drop"}]}).state_dict  # fmt: skip
    base = load_file(models / "base" / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    ratio = (written[name] - base[name]).norm() / (plain[name] - base[name]).norm() * 0.8
    assert float(ratio) == pytest.approx(result.learned.scales[f"bert.{name}"][0], rel=1e-4)
    logits = classify(tmp_path / "out", "first", models, TEXTS)
    torch.testing.assert_close(
        logits,
        result.heads["first"].logits(pooled(tmp_path / "out", models)),
        rtol=1e-4,
        atol=1e-4,
    )


def pooled(folder, models):
    backbone = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "base")
    with torch.no_grad():
        return backbone(**tokenizer(TEXTS, padding=True, return_tensors="pt")).pooler_output


def test_adamerging_writes_its_sum(models, tmp_path):
    path = recipe(models, method="adamerging", learn={"steps": 3, "lr_scale": 0.05, "check_every": 3})
    with pytest.raises(RecipeError, match="adamerging scales every task's own delta"):
        dirmerge.align(path, tmp_path / "out")
    plain = yaml.safe_load(path.read_text()) | {"merge_method": "task_arithmetic", "scale": 0.3}
    result = dirmerge.align(plain, tmp_path / "out")
    assert result.fits is None
    name = "encoder.layer.0.attention.self.query.weight"
    base = load_file(models / "base" / "model.safetensors")[name]
    deltas = [load_file(models / m / "model.safetensors")[f"bert.{name}"] - base for m in "ab"]
    scales = result.learned.scales[f"bert.{name}"]
    assert scales != [0.3, 0.3]
    expected = base + sum(s * d for s, d in zip(scales, deltas, strict=True))
    torch.testing.assert_close(
        load_file(tmp_path / "out" / "model.safetensors")[name], expected, rtol=0, atol=1e-6
    )


def test_the_fine_tunes_judge_the_learning(models, tmp_path):
    """Half of D_a + D_a is the fine-tune: at the start every prediction is its own, and a wild run stops."""
    path = recipe(
        models,
        method="learned",
        start="identity",
        learn={"steps": 30, "check_every": 5, "lr_scale": 0.3, "min_agreement": 0, "max_shift": 1},
    )
    plain = yaml.safe_load(path.read_text()) | {"merge_method": "task_arithmetic", "scale": 0.5}
    for model, data in (("a", "a.csv"), ("b", "b.jsonl")):
        column = plain["align"]["tasks"]["ab".index(model)].get("column")
        plain["models"] = [{"model": str(models / model)}] * 2
        chosen = {"data": str(models / data), "column": column}
        tasks = [{"name": name, **chosen} for name in ("first", "second")]
        found = dirmerge.align(plain | {"align": {**plain["align"], "tasks": tasks}}, tmp_path / model)
        assert found.learned.history[0].own == (1.0, 1.0)
        assert found.learned.best_step == 0
        assert min(found.learned.history[-1].own) < 1
        assert "those of the tasks' own fine-tunes, 100.0 % at the start" in found.learned.stopped
        assert any("the state after 0 of" in note for note in found.notes)


def test_heads_of_class_vectors_and_adapters(models, tmp_path):
    """Encoders with given heads; fine-tunes that are adapters: nothing but the base's modules is loaded."""
    generator = torch.Generator().manual_seed(3)
    for i, name in enumerate(("x", "y")):
        folder = tmp_path / name
        folder.mkdir()
        prefix = "base_model.model.encoder.layer.1.attention.self.value"
        tensors = {
            f"{prefix}.lora_A.weight": torch.randn(2, D, generator=generator),
            f"{prefix}.lora_B.weight": torch.randn(D, 2, generator=generator),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["value"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        write_head(tmp_path, f"head{i}", Head.of_class_vectors(torch.randn(4, D, generator=generator), 20.0))
    plain: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(models / "base"),
        "models": [{"model": str(tmp_path / name)} for name in "xy"],
        "scale": 0.5,
        "align": {
            "method": "rotation",
            "tasks": [
                {"name": n, "data": str(models / "a.csv"), "head": str(tmp_path / f"head{i}.safetensors")}
                for i, n in enumerate(("one", "two"))
            ],
        },
    }
    result = dirmerge.align(plain, tmp_path / "out")
    for fit in result.fits:
        assert 0 < fit.aligned.distance < fit.plain.distance
    assert json.loads((tmp_path / "out/heads/one.json").read_text())["info"]["features"] == "mean"
    # The adapter alone, learned: its fine-tune is base plus adapter, with which the start agrees wholly.
    plain["models"] = [plain["models"][0]] * 2
    plain["align"] |= {"method": "learned", "start": "identity", "learn": {"steps": 1}}
    learned = dirmerge.align(plain, tmp_path / "learned").learned
    assert learned.history[0].own == (1.0, 1.0)


def test_errors_name_file_and_column(models, tmp_path, monkeypatch):
    def fails(error, match, **section):
        with pytest.raises(error, match=match):
            dirmerge.align(recipe(models, **section), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def both(first, **more):
        second = {"name": "second", "data": str(models / "b.jsonl"), "column": "sentence"}
        return [{"name": "first", "data": str(models / "a.csv"), **first}, {**second, **more}]

    fails(RecipeError, r"a\.csv: has no column 'txt'; it has id, text", tasks=both({"column": "txt"}))
    fails(
        RecipeError, r"a\.csv: column 'id' must hold texts or images, got int", tasks=both({"column": "id"})
    )
    fails(
        CheckpointError, r"none\.csv: there is no such file", tasks=both({"data": str(models / "none.csv")})
    )
    (models / "bad.parquet").write_bytes(b"PAR1 nonsense")
    fails(CheckpointError, r"bad\.parquet: cannot be read", tasks=both({"data": str(models / "bad.parquet")}))
    fails(RecipeError, "must have one task per fine-tune", tasks=both({})[:1])
    fails(RecipeError, "the name 'first' is given twice", tasks=both({}, name="first"))
    fails(RecipeError, r"align\.tasks\[1\]\.model: must be one of the 2", tasks=both({}, model="zzz"))
    fails(
        RecipeError,
        r"align\.tasks\[0\]\.colum: unknown key; did you mean 'column'",
        tasks=both({"colum": "x"}),
    )
    fails(RecipeError, r"align\.learn\.lr_scale", learn={"lr_scale": -1})
    monkeypatch.setitem(sys.modules, "datasets", None)
    done = CliRunner().invoke(app, ["align", str(recipe(models)), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "pip install 'dirmerge[align]'" in done.stderr
    plain = yaml.safe_load((models / "recipe.yml").read_text())
    del plain["align"]
    with pytest.raises(RecipeError, match="align: is missing"):
        dirmerge.align(plain, tmp_path / "out")


def test_weights_that_the_features_need_must_be_merged(models, tmp_path):
    plain = yaml.safe_load(recipe(models).read_text())
    plain["tensors"] = [{"match": "pooler.*", "rule": "drop"}]
    with pytest.raises(MismatchError, match=r"task first: its features need pooler\.dense"):
        dirmerge.align(plain, tmp_path / "out")


def test_merge_leaves_the_section_alone(models, tmp_path):
    plain = yaml.safe_load(recipe(models).read_text())
    plain["tensors"] = [{"match": "classifier.*", "rule": "drop"}]
    assert dirmerge.merge(plain).state_dict
