from __future__ import annotations

from typing import Any

import pytest
import torch

from dirmerge.engine.card import recipe_text
from dirmerge.errors import RecipeError
from dirmerge.recipe import Setting, load_recipe, parse_size
from dirmerge.recipe.loading import MAX_RECIPE_BYTES

MINIMAL = {"merge_method": "tsv_m", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}


def load(**changes):
    return load_recipe({**MINIMAL, **changes})


def problem(source) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    return str(caught.value)


def test_mergekit_recipe_is_read(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(
        """
models:
  - model: org/base
  - model: org/one@main
    parameters: {weight: 0.5, density: 0.4}
  - model: org/two+org/adapter
    parameters:
      density: 0.4
      weight:
        - filter: mlp
          value: [0.0, 1.0]
        - value: 1e-1
merge_method: ties
base_model: org/base
parameters: {normalize: true, lambda: 0.7}
dtype: float32
out_dtype: bfloat16
tokenizer: {source: base}
"""
    )
    recipe = load_recipe(path)
    assert [entry.model.label for entry in recipe.tasks()] == ["org/one@main", "org/two+org/adapter"]
    assert (recipe.tasks()[1].model.source, recipe.tasks()[1].model.adapter) == ("org/two", "org/adapter")
    assert recipe.scale is not None
    assert recipe.scale.constant == 0.7
    assert recipe.output_dtype is torch.bfloat16
    assert recipe.options("x", 0) == {"density": 0.4}
    assert recipe.weights("layers.1.mlp.weight", 0.25) == [0.5, 0.25]
    assert recipe.weights("layers.1.attention.weight", 0.25) == [0.5, 0.1]


def test_dtype_is_the_output_dtype_unless_out_dtype_is_given():
    assert load().output_dtype is None
    assert load(dtype="float16").output_dtype is torch.float16
    assert load(dtype="float16", out_dtype="float32").output_dtype is torch.float32


@pytest.mark.parametrize(
    ("value", "depth", "expected"),
    [
        (2, 0.3, 2),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 4], 0.75, 2.5),
        ([3.0], 0.4, 3.0),
        ([{"value": [0, 2], "filter": "query"}, {"value": 9}], 0.5, 1.0),
        ([{"value": 5, "filter": "*"}], 0.5, 5),
        ([{"value": 5, "filter": "key"}, {"value": 6, "filter": "quer"}], 0.5, 6),
        ([{"value": 5, "filter": "key"}], 0.5, None),
    ],
)
def test_setting_values(value, depth, expected):
    recipe = load(parameters={"weight": value})
    found = recipe.parameters["weight"].at("layers.0.query.weight", depth)
    assert found == expected


def test_everything_wrong_is_listed_at_once_with_suggestions():
    text = problem(
        {
            "merge_method": "tsv_m",
            "base_modle": "x",
            "models": [{"model": "a", "parameters": {"wieght": 1}}, {"mdoel": "b"}],
            "dtype": "fp8",
            "out_dtype": 3,
            "tensors": [{"match": [], "rule": "keep"}],
            "slices": [{"sources": []}],
            "tokenizer": {"source": "base", "tokens": {"x": 1}},
            "shard_size": "five",
        }
    )
    for part in (
        "base_modle: unknown key; did you mean 'base_model'?",
        "models[0].parameters.wieght: tsv_m has no such parameter; did you mean 'weight'?",
        "models[1].mdoel: unknown key; did you mean 'model'?",
        "models[1].model: is missing",
        "dtype: must be one of float64, float32, float16, bfloat16, got 'fp8'",
        "out_dtype: must be one of",
        "tensors[0].match: must be a glob",
        "tensors[0].rule: must be 'merge'",
        "slices: dirmerge merges whole models",
        "tokenizer.tokens: dirmerge does not build token embeddings",
        "shard_size: must be a size such as 5GB",
    ):
        assert part in text
    assert "11 problems" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "slerp"}, "slerp is mergekit's own; dirmerge has average"),
        ({"merge_method": "dc-merge"}, "did you mean 'dc_merge'?"),
        ({"models": []}, "models: list at least one model"),
        ({"models": [{"model": "base"}]}, "lists only the base model"),
        ({"modules": {"a": 1}}, "modules: dirmerge merges every module"),
        ({"tokenizer_source": "union"}, "a union of tokenizers needs new embedding rows"),
        ({"tokenizer_source": "c"}, "must be `base` or a listed model, got 'c'"),
        ({"tokenizer_source": "a", "tokenizer": {"source": "b"}}, "not both"),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "keeps the base's embedding shape"),
        ({"chat_template": "chatml"}, "chat_template: must be `auto`, a Jinja template or the path"),
        ({"scale": 1, "alignment": 0.8}, "give one of them"),
        ({"scale": 1, "parameters": {"lambda": 1}}, "`scale` is given twice"),
        ({"scale": 1, "alignment_per": "model"}, "has no meaning beside `scale`"),
        ({"scale": "much"}, "scale: must be a number"),
        ({"scale": float("nan")}, "scale: must be finite"),
        ({"alignment": 0}, "alignment: must be positive and finite"),
        ({"alignment_per": "layer"}, "must be 'model' or 'parameter'"),
        ({"parameters": {"weight": "x"}}, "parameters.weight: must be a number"),
        ({"parameters": {"weight": []}}, "must not be an empty list"),
        ({"parameters": {"weight": [1, "x"]}}, "a list over the layers holds numbers, got 'x'"),
        ({"parameters": {"weight": [{"value": 1}, {"value": 2, "filter": "x"}]}}, "must be the last one"),
        ({"parameters": {"weight": [{"value": 1, "fliter": "x"}]}}, "`value` and `filter`, got 'fliter'"),
        ({"parameters": {"weight": [{"filter": "x"}]}}, "an item needs a `value`"),
        ({"parameters": {"int8_mask": True}}, "int8_mask: dirmerge stores no masks"),
        ({"parameters": {"normalize": True}}, "normalize"),
        ({"merge_method": "ties", "parameters": {"normalize": False}}, "normalize: must be true for ties"),
        ({"models": [{"model": "a", "parameters": {"scale": 1}}]}, "is one for all models, move it"),
        ({"models": [{"model": "base", "parameters": {"weight": 1}}, {"model": "a"}]}, "base has no delta"),
        ({"tensors": [{"match": "x", "rule": "take"}]}, "`take` needs the model to take from"),
        ({"tensors": [{"match": "x", "rule": "mean", "model": "a"}]}, "only the rule `take` names a model"),
        ({"tensors": [{"match": "x", "rule": "take", "model": "c"}]}, "must be a listed model, got 'c'"),
        ({"tensors": [{"match": "x", "rule": "take", "model": 2}]}, "must be less than 2"),
        ({"seed": -1}, "seed"),
        ({"models": [{"model": ""}]}, "got an empty string"),
        ({"models": [{"model": {"a": 1}}]}, "a state dict of tensors"),
        ({"models": [{"model": "a+"}]}, "needs both parts"),
        ({"models": "a"}, "models"),
    ],
)  # fmt: skip
def test_refused(changes, message):
    assert message in problem({**MINIMAL, **changes})


def test_options_inside_models_must_agree():
    models: list[dict[str, Any]] = [
        {"model": "a", "parameters": {"density": 0.3}},
        {"model": "b", "parameters": {"density": 0.4}},
    ]
    text = problem({"merge_method": "ties", "base_model": "base", "models": models})
    assert "ties has one density for all models" in text
    models[1]["parameters"]["density"] = 0.3
    recipe = load_recipe({"merge_method": "ties", "base_model": "base", "models": models})
    assert recipe.options("x", 0.0) == {"density": 0.3}


def test_linear_is_the_average_at_scale_one():
    models = [{"model": "a", "parameters": {"weight": 2}}, {"model": "b", "parameters": {"weight": 1}}]
    recipe = load_recipe({"merge_method": "linear", "models": models})
    assert recipe.method == "average"
    assert recipe.scale is not None
    assert recipe.scale.constant == 1.0
    assert recipe.base is not None
    assert recipe.base.label == "a"
    assert len(recipe.tasks()) == 2
    assert "linear has no scale" in problem({"merge_method": "linear", "models": models, "scale": 2})
    assert "normalize: must be true" in problem(
        {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    )


def test_the_base_listed_among_the_models_is_no_task_but_for_averages():
    models = [{"model": "base"}, {"model": "a"}]
    assert len(load(models=models).tasks()) == 1
    assert len(load(models=models, merge_method="average").tasks()) == 2


def test_a_folder_whose_name_has_a_plus_is_not_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert load(models=[{"model": "a+b"}]).models[0].model.adapter is None
    reference = load(models=[{"model": "a+b+c"}]).models[0].model
    assert (reference.source, reference.adapter) == ("a+b", "c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmerge_method: ties\n", "key 'merge_method' is given twice (lines 1 and 2)"),
        ("models: [\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("\n\n", "is empty"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deeply"),
        ("a: 2024-13-45\n", "is not valid YAML"),
        ("a: 1\n---\nb: 2\n", "is not valid YAML"),
    ],
)
def test_hostile_yaml(text, message):
    assert message in problem(text)


def test_alias_bomb_and_size_limits(tmp_path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    assert "exceeds the limit" in problem(bomb)
    path = tmp_path / "big.yml"
    path.write_text("# " + "x" * MAX_RECIPE_BYTES)
    assert "exceeds the limit" in problem(path)
    assert "cannot be read" in problem(tmp_path / "none.yml")
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problem(path)


def test_aliases_within_reason_are_read():
    recipe = load_recipe(
        "merge_method: ties\nbase_model: b\nmodels:\n- model: x\n  parameters: &p {weight: 2}\n"
        "- model: y\n  parameters: *p\n"
    )
    assert recipe.weights("t", 0.0) == [2.0, 2.0]


def test_plain_form_names_state_dicts():
    state = {"w": torch.zeros(2)}
    recipe = load(base_model=state, models=[{"model": dict(state), "parameters": {"weight": 2}}])
    assert recipe.base_model.source is state
    assert recipe.to_plain()["base_model"] == "<state dict>"
    assert "weight: 2" in recipe_text(recipe.to_plain())


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "1.5 MB", "2GiB", 7, "9")] == [5 * 10**9, 1_500_000, 2**31, 7, 9]
    for bad in ("0GB", "GB", "5 apples", -1, True, 1.5):
        with pytest.raises(ValueError, match="must be a size"):
            parse_size(bad)


def test_setting_without_filter_is_constant():
    assert Setting(((None, 3),)).constant == 3
    assert Setting((("x", 3),)).constant is None
    assert Setting(((None, (1.0, 2.0)),)).constant is None
