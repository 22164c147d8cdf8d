from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import MATRICES, tiny_state, write_adapter_folder, write_model
from safetensors.torch import save_file

from dirmerge.errors import CheckpointError, MismatchError, RecipeError
from dirmerge.planning import Plan, make_plan
from dirmerge.planning.names import common_prefix, is_table, layer_depths
from dirmerge.recipe import load_recipe

BASE = tiny_state()


@pytest.fixture
def models(tmp_path):
    """Folders base, a, b of a tiny model and its fine-tunes."""
    write_model(tmp_path / "base", BASE)
    for seed, name in enumerate("ab", 1):
        write_model(tmp_path / name, tiny_state(seed, base=BASE))
    return tmp_path


def recipe(folder, *models, base="base", method="tsv_m", **keys):
    plain = {"merge_method": method, "models": [{"model": str(folder / m)} for m in models], **keys}
    if base is not None:
        plain["base_model"] = str(folder / base)
    return load_recipe(plain)


def plan(*args, as_adapter=False, rank=None, **keys):
    return make_plan(recipe(*args, **keys), as_adapter=as_adapter, rank=rank)


def rules(planned):
    return {tensor.name: tensor.rule for tensor in planned.tensors}


def mismatch(*args, **keys) -> str:
    with pytest.raises(MismatchError) as caught:
        plan(*args, **keys)
    return str(caught.value)


def test_default_rules_of_a_spectral_method(models):
    planned = plan(models, "a", "b")
    expected = {name: "merge" if name[:-7] in MATRICES else "mean" for name in BASE}
    assert rules(planned) == expected
    by_name = {tensor.name: tensor for tensor in planned.tensors}
    query = by_name["layers.0.attn.q_proj.weight"]
    assert query.shape == (16, 16)
    assert query.rank == 16  # ⌊16 / 2⌋ of each of two tasks
    assert query.flops > 0
    assert query.peak_bytes > 0
    assert query.seed != by_name["layers.1.attn.q_proj.weight"].seed
    assert "embed_tokens" in by_name["embed_tokens.weight"].why
    json.dumps(planned.to_dict())


def test_elementwise_methods_take_every_floating_tensor(models):
    assert set(rules(plan(models, "a", "b", method="ties")).values()) == {"merge"}


def test_recipe_rules_win_in_their_order(models):
    planned = plan(
        models,
        "a",
        "b",
        tensors=[
            {"match": "layers.0.attn.*", "rule": "base"},
            {"match": ["layers.*.weight", "nothing-of-this"], "rule": "mean"},
            {"match": "lm_head.*", "rule": "merge"},
            {"match": "norm.weight", "rule": "drop"},
            {"match": "embed_*", "rule": "take", "model": 1},
        ],
    )
    found = rules(planned)
    assert found["layers.0.attn.q_proj.weight"] == found["layers.0.attn.q_proj.bias"] == "base"
    assert found["layers.1.mlp.up_proj.weight"] == "mean"
    assert found["lm_head.weight"] == "merge"
    assert found["norm.weight"] == "drop"
    assert found["embed_tokens.weight"] == "take"
    assert "norm.weight" not in {tensor.name for tensor in planned.written}


def test_a_rule_that_does_nothing_is_an_error(models):
    text = mismatch(
        models,
        "a",
        tensors=[
            {"match": "*.weight", "rule": "mean"},
            {"match": "norm.weight", "rule": "base"},
            {"match": "encoder.*", "rule": "base"},
        ],
    )
    assert "tensors[1] (norm.weight): an earlier rule takes every tensor it matches" in text
    assert "tensors[2] (encoder.*): matches no tensor" in text


def test_all_mismatches_are_listed_with_what_resolves_them(models):
    state = tiny_state(3, base=BASE)
    state["embed_tokens.weight"] = torch.zeros(34, 16)
    state["norm.weight"] = torch.zeros(17)
    for layer in (0, 1, 11):
        del state[f"layers.{layer}.attn.q_proj.bias"]
    state["classifier.weight"] = torch.zeros(3, 16)
    write_model(models / "c", state)
    text = mismatch(models, "a", "c")
    assert "6 problems" in text
    assert "embed_tokens.weight has shape [32, 16] in the base, [34, 16] in" in text
    assert '- {match: "embed_tokens.weight", rule: common_rows}' in text
    assert '- {match: "norm.weight", rule: base}' in text
    assert "layers.*.attn.q_proj.bias (3 tensors) is missing in" in text
    assert '- {match: "layers.*.attn.q_proj.bias", rule: present}' in text
    assert '- {match: "classifier.weight", rule: take, model: 1}' in text
    lines = [
        {"match": "embed_tokens.weight", "rule": "common_rows"},
        {"match": "norm.weight", "rule": "base"},
        {"match": "layers.*.attn.q_proj.bias", "rule": "present"},
        {"match": "classifier.weight", "rule": "take", "model": 1},
    ]
    planned = plan(models, "a", "c", tensors=lines)
    found = {tensor.name: tensor for tensor in planned.tensors}
    assert found["embed_tokens.weight"].rows == 32
    assert found["classifier.weight"].rule == "take"
    assert [s.task for s in found["layers.0.attn.q_proj.bias"].sources] == [0]


def test_a_glob_is_proposed_only_where_it_fits_nothing_else(models):
    state = tiny_state(3, base=BASE)
    for layer in (0, 1):
        del state[f"layers.{layer}.attn.q_proj.bias"]
    write_model(models / "c", state)
    text = mismatch(models, "a", "c")
    assert "layers.*" not in text
    assert '- {match: ["layers.0.attn.q_proj.bias", "layers.1.attn.q_proj.bias"], rule: present}' in text


def test_integers_must_agree_or_follow_a_rule(models):
    for name in ("base", "a", "b"):
        state = tiny_state(0 if name == "base" else 1, base=None if name == "base" else BASE)
        write_model(models / name, {**state, "position_ids": torch.arange(4)})
    assert rules(plan(models, "a", "b"))["position_ids"] == "identical"
    text = mismatch(models, "a", tensors=[{"match": "position_ids", "rule": "mean"}])
    assert "there is no mean of integers" in text
    write_model(models / "a", tiny_state(1, base=BASE))
    found = {t.name: t for t in plan(models, "a", "b").tensors}["position_ids"]
    assert found.rule == "identical"
    assert "lack it" in found.notes[0]


def test_tied_output_embedding_is_written_once(models):
    config = {"tie_word_embeddings": True, "torch_dtype": "float32"}
    for seed, name in enumerate(("base", "a", "b")):
        state = tiny_state(seed, base=BASE if seed else None)
        state["lm_head.weight"] = state["embed_tokens.weight"].clone()
        if name == "b":
            del state["lm_head.weight"]
        write_model(models / name, state, config=config)
    planned = plan(models, "a", "b")
    found = {tensor.name: tensor for tensor in planned.tensors}["lm_head.weight"]
    assert (found.rule, found.tied_to, found.written) == ("tied", "embed_tokens.weight", False)
    assert any("tied" in note for note in planned.notes)
    # the other way round: only the fine-tune stores it
    planned = plan(models, "a", base="b")
    found = {tensor.name: tensor for tensor in planned.tensors}["lm_head.weight"]
    assert (found.rule, found.tied_to) == ("tied", "embed_tokens.weight")


def test_a_common_prefix_is_found_and_noted(models):
    state = {f"model.{name}": value for name, value in tiny_state(1, base=BASE).items()}
    write_model(models / "prefixed", state)
    planned = plan(models, "prefixed", "b")
    assert set(rules(planned)) == set(BASE)
    assert any("'model.' is taken from" in note for note in planned.notes)
    assert planned.tensors[0].sources[0].tensor == f"model.{planned.tensors[0].name}"
    planned = plan(models, "a", base="prefixed")
    assert set(rules(planned)) == set(state)


def test_fused_experts_are_slices_and_other_3d_tensors_are_not(models):
    extra = {"layers.0.mlp.experts.down_proj": torch.zeros(4, 6, 8), "conv.weight": torch.zeros(4, 6, 8)}
    for seed, name in enumerate(("base", "a")):
        write_model(models / name, {**tiny_state(seed, base=BASE if seed else None), **extra})
    found = {tensor.name: tensor for tensor in plan(models, "a").tensors}
    assert (found["layers.0.mlp.experts.down_proj"].rule, found["layers.0.mlp.experts.down_proj"].slices) == (
        "merge",
        4,
    )
    assert found["conv.weight"].rule == "mean"


def test_merge_rule_on_what_is_no_matrix(models):
    text = mismatch(models, "a", tensors=[{"match": "norm.weight", "rule": "merge"}])
    assert "norm.weight has shape [16], and tsv_m merges matrices" in text


def test_gradients_follow_the_layers(models):
    planned = make_plan(
        load_recipe(
            {
                "merge_method": "tsv_m",
                "base_model": str(models / "base"),
                "models": [
                    {"model": str(models / "a"), "parameters": {"weight": [0, 11]}},
                    {"model": str(models / "b")},
                ],
                "scale": [{"filter": "mlp", "value": 2}, {"value": [0, 1]}],
            }
        )
    )
    found = {tensor.name: tensor for tensor in planned.tensors}
    weights = [found[f"layers.{i}.attn.q_proj.weight"].sources[0].weight for i in (0, 1, 11)]
    assert weights == pytest.approx([0, 1, 11])
    assert found["layers.0.mlp.up_proj.weight"].scale == 2
    assert found["layers.11.attn.q_proj.weight"].scale == 1


def test_options_are_checked_before_anything_is_read(models):
    with pytest.raises(RecipeError, match="smoothing"):
        plan(models, "a", method="dc_merge", parameters={"smoothing": "fast"})
    with pytest.raises(RecipeError, match="weights must not be negative"):
        plan(models, "a", "b", parameters={"weight": -1})
    with pytest.raises(RecipeError, match="scale: has no value for"):
        plan(models, "a", scale=[{"filter": "mlp", "value": 1}])


def test_unused_filters_are_noted(models):
    planned = plan(models, "a", parameters={"weight": [{"filter": "self_attn", "value": 2}, {"value": 1}]})
    assert any("self_attn" in note for note in planned.notes)


def test_adapters_on_a_base(models):
    for seed, (name, rank) in enumerate({"x": 2, "y": 3}.items()):
        write_adapter_folder(models / name, rank=rank, seed=seed)
    planned = plan(models, "x", "y")
    found = {tensor.name: tensor for tensor in planned.tensors}
    query = found["layers.0.attn.q_proj.weight"]
    assert ([s.rank for s in query.sources], query.rank) == ([2, 3], 5)
    assert (found["norm.weight"].rule, found["norm.weight"].why) == ("base", "no adapter changes it")
    assert planned.adapters
    assert "for adapters" in planned.scale.origin


def test_different_sets_of_modules_are_an_error(models):
    write_adapter_folder(models / "x")
    few = dict(list(MATRICES.items())[:2])
    write_adapter_folder(models / "y", few)
    text = mismatch(models, "x", "y")
    assert "layers.1.attn.q_proj.weight is not changed by" in text
    assert "rule: present" in text
    missing = [f"{name}.weight" for name in MATRICES if name not in few]
    planned = plan(models, "x", "y", tensors=[{"match": missing, "rule": "present"}])
    found = {tensor.name: tensor for tensor in planned.tensors}
    assert len(found["layers.1.attn.q_proj.weight"].sources) == 1


def test_adapter_modules_find_the_base_under_a_prefix(models):
    write_model(models / "wrapped", {f"model.{name}": value for name, value in BASE.items()})
    write_adapter_folder(models / "x")
    planned = plan(models, "x", base="wrapped")
    assert rules(planned)["model.layers.0.attn.q_proj.weight"] == "merge"
    write_adapter_folder(models / "y", {f"backbone.{name}": shape for name, shape in MATRICES.items()})
    planned = plan(models, "y")
    assert rules(planned)["layers.0.attn.q_proj.weight"] == "merge"
    assert any("'backbone.' is taken from" in note for note in planned.notes)


def test_modules_that_the_base_lacks(models):
    write_adapter_folder(models / "x", {**MATRICES, "extra.proj": (4, 4)})
    text = mismatch(models, "x")
    assert "extra.proj.weight is changed by the adapter" in text
    assert '- {match: "extra.proj.weight", rule: drop}' in text
    assert (
        rules(plan(models, "x", tensors=[{"match": "extra.*", "rule": "drop"}]))["extra.proj.weight"]
        == "drop"
    )


def test_adapter_made_for_other_shapes(models):
    write_adapter_folder(models / "x", {"layers.0.mlp.up_proj": (20, 16)})
    assert "does not fit the base model" in mismatch(models, "x")


def test_as_adapter_needs_adapters_only(models):
    write_adapter_folder(models / "x")
    write_adapter_folder(models / "y", seed=1)
    planned = plan(models, "x", "y", base=None, as_adapter=True)
    assert {tensor.rank for tensor in planned.tensors} == {4}
    assert plan(models, "x", "y", base=None, as_adapter=True, rank=3).tensors[0].rank == 3
    with pytest.raises(RecipeError, match="is a full model, and an adapter can only be made from adapters"):
        plan(models, "x", "a", as_adapter=True)
    with pytest.raises(RecipeError, match=r"base_model is missing: give it \(the adapters name tiny/base\)"):
        plan(models, "x", "y", base=None)
    with pytest.raises(RecipeError, match="adapter_rank requires --as adapter"):
        plan(models, "x", "y", rank=3)
    with pytest.raises(RecipeError, match="ties gives a dense update, which is no adapter; choose a rank"):
        plan(models, "x", "y", base=None, as_adapter=True, method="ties")


def test_adapters_that_peft_cannot_store_together(models):
    write_adapter_folder(models / "x", {"lm_head": (32, 16)})
    write_adapter_folder(
        models / "y", {"layers.0.mlp.up_proj": (24, 16)}, saved={"lm_head.weight": torch.zeros(32, 16)}
    )
    present = {"tensors": [{"match": "layers.*", "rule": "present"}]}
    with pytest.raises(MismatchError, match=r"lm_head\.weight is a full tensor in .*y and an"):
        plan(models, "x", "y", base=None, as_adapter=True, **present)


def test_tensors_that_no_model_has(models):
    for name in "ab":
        state = tiny_state(1, base=BASE)
        del state["norm.weight"]
        write_model(models / name, state)
    assert '- {match: "norm.weight", rule: base}' in mismatch(models, "a", "b")
    mismatch(models, "a", "b", tensors=[{"match": "norm.weight", "rule": "mean"}])
    present = {"tensors": [{"match": "norm.weight", "rule": "present"}]}
    assert rules(plan(models, "a", "b", **present))["norm.weight"] == "base"


def test_the_base_is_no_adapter(models):
    write_adapter_folder(models / "x")
    with pytest.raises(RecipeError, match="is an adapter, give the model it is for"):
        plan(models, "a", base="x")
    with pytest.raises(RecipeError, match="names an adapter on top of a model"):
        plan(models, "a", base=f"base+{models / 'x'}")


def test_missing_inputs(models):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        plan(models, "a", "nowhere")


@pytest.mark.parametrize(
    ("name", "shape", "table"),
    [
        ("model.embed_tokens.weight", (100, 8), True),
        ("transformer.wte.weight", (100, 8), True),
        ("lm_head.weight", (100, 8), True),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), True),
        ("vit.embeddings.position_embeddings", (1, 17, 8), True),
        ("cls.predictions.decoder.weight", (64, 8), True),
        ("score.weight", (8, 64), True),
        ("model.layers.0.self_attn.q_proj.weight", (8, 8), False),
        ("visual_projection.weight", (8, 8), False),
    ],
)
def test_is_table(name, shape, table):
    config = {"text_config": {"vocab_size": 64, "hidden_size": 8}}
    assert (is_table(name, shape, config) is not None) is table


def test_a_vocabulary_as_large_as_a_layer_says_nothing():
    assert is_table("q.weight", (64, 64), {"vocab_size": 64, "hidden_size": 64}) is None


def test_layer_depths():
    depths = layer_depths(
        [
            "embed.weight",
            "h.0.w",
            "h.2.w",
            "h.4.w",
            "vision.layers.0.w",
            "vision.layers.1.w",
            "head.w",
            "only.0.w",
        ]
    )
    assert depths == {
        "embed.weight": 0,
        "h.0.w": 0,
        "h.2.w": 0.5,
        "h.4.w": 1,
        "vision.layers.0.w": 0,
        "vision.layers.1.w": 1,
        "head.w": 1,
        "only.0.w": 1,
    }


def test_common_prefix():
    known = {"bert.a.w", "bert.b.w", "head.w"}
    assert common_prefix({"a.w", "b.w"}, known) == ("", "bert.")
    assert common_prefix({"m.bert.a.w"}, known) == ("m.", "")
    assert common_prefix({"bert.a.w"}, known) == ("", "")
    assert common_prefix({"a.w", "c.w"}, known) is None
    assert common_prefix({"a.w"}, {"x.a.w", "y.a.w"}) is None  # two would do


def test_hostile_index_is_refused(models, tmp_path):
    write_model(tmp_path / "evil", BASE, shards=2)
    path = tmp_path / "evil" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../base/model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must lie in a file of this folder"):
        plan(models, "evil")


def test_unsupported_dtype_is_refused(models):
    (models / "fp8").mkdir()
    save_file({"norm.weight": torch.zeros(16).to(torch.float8_e4m3fn)}, models / "fp8" / "model.safetensors")
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        plan(models, "fp8")


@pytest.mark.parametrize("as_adapter", [False, True])
def test_a_plan_is_plain_data_that_opens_again(models, as_adapter):
    write_adapter_folder(models / "x")
    write_adapter_folder(models / "y", seed=1)
    names = ("x", "y") if as_adapter else ("a", "x")
    planned = plan(models, *names, base=None if as_adapter else "base", as_adapter=as_adapter)
    again = Plan.from_dict(json.loads(json.dumps(planned.to_dict())))
    assert again == planned
    assert again.to_dict() == planned.to_dict()
    assert again.fingerprint() == planned.fingerprint()
    with again.open() as inputs:
        assert [task.modules for task in inputs.tasks] == [task.modules for task in planned.open().tasks]
    changed = replace(again, seed=7, _inputs=None)
    assert changed.fingerprint() != planned.fingerprint()
    planned.close()
    adapter = models / "x" / "adapter_model.safetensors"
    write_adapter_folder(models / "x2", rank=3)
    adapter.write_bytes((models / "x2" / "adapter_model.safetensors").read_bytes())
    config = models / "x" / "adapter_config.json"
    config.write_bytes((models / "x2" / "adapter_config.json").read_bytes())
    with pytest.raises(MismatchError, match="has changed since the merge was planned"):
        replace(again, _inputs=None).open()
