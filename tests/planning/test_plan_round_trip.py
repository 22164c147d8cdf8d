"""Plans are plain data: over random recipes for real folders, JSON gives back an equal plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers import tiny_state, write_adapter_folder, write_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dirmerge.errors import MismatchError, RecipeError
from dirmerge.methods import METHODS
from dirmerge.planning import Plan, Rule, TensorPlan, make_plan
from dirmerge.recipe import load_recipe

BASE = {
    **tiny_state(),
    "experts.down_proj": torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(1)),
    "position_ids": torch.arange(16),
}
POOLS = {
    "full": ("full32", "full16", "narrow", "wider"),
    "adapters": ("lora2", "lora3", "rslora", "saved"),
    "mixed": ("full32", "narrow", "lora2", "rslora"),
    "tied": ("tied1", "tied2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one architecture in several dtypes, sharded or not, and adapters of several kinds."""
    folder = tmp_path_factory.mktemp("models")

    def write(
        name: str, seed: int, dtype: torch.dtype, shards: int, *without: str
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        state = {
            key: value + 0.01 * torch.randn(value.shape, generator=generator) if seed else value
            for key, value in BASE.items()
            if value.is_floating_point() and key not in without
        }
        state = {key: value.to(dtype) for key, value in state.items()} | {"position_ids": torch.arange(16)}
        write_model(folder / name, state, shards)
        return state

    write("base32", 0, torch.float32, 1)
    write("base16", 0, torch.bfloat16, 2)
    write("full32", 1, torch.float32, 3)
    write("full16", 2, torch.float16, 1)
    write("narrow", 3, torch.bfloat16, 1, "norm.weight", "layers.0.attn.q_proj.bias")
    state = write("wider", 4, torch.float32, 1)
    write_model(folder / "wider", state | {"embed_tokens.weight": torch.randn(35, 16)})
    write_adapter_folder(folder / "lora2")
    write_adapter_folder(folder / "lora3", rank=3, seed=1, dtype=torch.bfloat16)
    write_adapter_folder(folder / "rslora", {"layers.0.mlp.up_proj": (24, 16)}, 4, seed=2, use_rslora=True)
    for seed in range(3):
        state = tiny_state(seed, base=tiny_state() if seed else None)
        state["lm_head.weight"] = state["embed_tokens.weight"].clone()
        config = {"tie_word_embeddings": True, "torch_dtype": "float32"}
        write_model(folder / f"tied{seed}", state, config=config)
    saved = {"lm_head.weight": torch.randn(32, 16)}
    write_adapter_folder(folder / "saved", saved=saved, modules_to_save=["lm_head"])
    return folder


def settings_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value for all tensors, values over the layers, or values by filters."""
    case = st.builds(lambda name, x: {"filter": name, "value": x}, st.sampled_from(["mlp", "attn"]), values)
    return st.one_of(
        values,
        st.lists(values, min_size=1, max_size=3),
        st.builds(lambda cases, x: [*cases, {"value": x}], st.lists(case, min_size=1, max_size=2), values),
    )


NUMBERS = st.floats(0.01, 2, allow_subnormal=False)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "dc_merge": st.fixed_dictionaries({}, optional={"rho": st.floats(1, 9), "rank": st.integers(1, 20)}),
    "iso_cts": st.fixed_dictionaries({}, optional={"common_fraction": st.floats(0.1, 1)}),
    "mda": st.fixed_dictionaries({}, optional={"frame": st.sampled_from(["random", "procrustes"])}),
    "ties": st.fixed_dictionaries({}, optional={"density": st.floats(0.1, 1)}),
    "tsv_m": st.fixed_dictionaries({}, optional={"svd": st.sampled_from(["auto", "exact", "randomized"])}),
}
RULES: list[dict[str, Any]] = [
    {"match": "embed_tokens.weight", "rule": "common_rows"},
    {"match": ("norm.weight", "*.bias"), "rule": "present"},
    {"match": "experts.*", "rule": "merge"},
    {"match": ["lm_head.*"], "rule": "base"},
    {"match": "layers.1.mlp.*", "rule": "mean"},
    {"match": "layers.11.*", "rule": "take", "model": 0},
    {"match": "norm.weight", "rule": "drop"},
]


@st.composite
def recipes(draw: st.DrawFn, method: str) -> tuple[dict[str, Any], bool, int | None]:
    """A recipe with names for folders, whether it is for an adapter, and that adapter's rank."""
    kind = draw(st.sampled_from(list(POOLS)))
    as_adapter = kind == "adapters" and draw(st.booleans())
    names = draw(st.lists(st.sampled_from(POOLS[kind]), min_size=1, max_size=4))
    models: list[dict[str, Any]] = [{"model": name} for name in names]
    for model in models:
        if draw(st.booleans()):
            model["parameters"] = {"weight": draw(settings_of(NUMBERS))}
    keys: dict[str, Any] = {
        "dtype": st.sampled_from(["float32", "bfloat16", torch.float16]),
        "out_dtype": st.sampled_from(["float64", "float16"]),
        "seed": st.integers(0, 2**40),
        "shard_size": st.sampled_from([2000, "5KB", "1GiB"]),
        "tokenizer_source": st.sampled_from(["base", names[0]]),
        "chat_template": st.just("{{ messages }}"),
        "tensors": st.lists(st.sampled_from(RULES), min_size=1, max_size=7, unique_by=id).map(tuple),
        "parameters": OPTIONS.get(method, st.just({})),
    }
    if method != "average":
        raw, target = {"scale": settings_of(NUMBERS)}, {"alignment": NUMBERS}
        keys |= draw(st.sampled_from([{}, raw, target, {**target, "alignment_per": st.just("parameter")}]))
    plain = draw(st.fixed_dictionaries({}, optional=keys))
    plain |= {"merge_method": method, "models": models}
    if not as_adapter or draw(st.booleans()):
        bases = ["tied0"] if kind == "tied" else ["base32", "base16", "state dict"]
        plain["base_model"] = draw(st.sampled_from(bases))
    return plain, as_adapter, draw(st.none() | st.integers(1, 5)) if as_adapter else None


def in_folder(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the recipe with paths, and tensors for the base that is a state dict."""
    plain = {**plain, "models": [{**entry, "model": folder / entry["model"]} for entry in plain["models"]]}
    if plain.get("base_model") == "state dict":
        plain["base_model"] = BASE
    elif "base_model" in plain:
        plain["base_model"] = str(folder / plain["base_model"])
    if plain.get("tokenizer_source", "base") != "base":
        plain["tokenizer_source"] = str(folder / plain["tokenizer_source"])
    return plain


def types(tensor: TensorPlan) -> dict[str, type]:
    return {key: type(value) for key, value in vars(tensor).items()}


def test_json_gives_back_an_equal_plan(folder: Path) -> None:
    plans: list[Plan] = []

    def check(case: tuple[dict[str, Any], bool, int | None]) -> None:
        plain, as_adapter, rank = case
        try:
            planned = make_plan(load_recipe(in_folder(plain, folder)), as_adapter=as_adapter, rank=rank)
        except (RecipeError, MismatchError):
            assume(False)
        planned.close()
        text = json.dumps(planned.to_dict(), allow_nan=False)
        again = Plan.from_dict(json.loads(text))
        assert again == planned
        assert json.dumps(again.to_dict()) == text
        assert again.fingerprint() == planned.fingerprint()
        # An equal value of another type, such as 1 for True, would be equal too.
        assert list(map(types, again.tensors)) == list(map(types, planned.tensors))
        plans.append(planned)

    for method in sorted(METHODS):
        settings(max_examples=30, deadline=None, derandomize=True)(given(recipes(method))(check))()
    # The recipes above reach what a plan can hold.
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    sources = [source for tensor in tensors for source in tensor.sources]
    assert {plan.method_name for plan in plans} == set(METHODS)
    assert {tensor.rule for tensor in tensors} == set(get_args(Rule))
    assert {source.kind for source in sources} == {"dense", "low-rank", "unchanged"}
    assert {plan.scale.per for plan in plans} == {"model", "parameter"}
    for holder, keys in (
        (plans, ("base", "dtype", "chat_template", "base_name", "notes")),
        ([plan.scale for plan in plans], ("value", "alignment")),
        (tensors, ("options", "scale", "rank", "slices", "rows", "tied_to", "module", "notes")),
        (sources, ("tensor", "saved", "module", "rank", "dtype")),
    ):
        for key in keys:
            assert {bool(getattr(item, key)) for item in holder} == {True, False}, key
    assert len({plan.fingerprint() for plan in plans}) > len(plans) / 2
