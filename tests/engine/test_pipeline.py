from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blake3 import blake3
from helpers import MATRICES, tiny_state, write_adapter_folder, write_model
from safetensors.torch import load_file, save_file

from dirmerge import LowRank, api, merge_deltas
from dirmerge.engine import merged_rows, pipeline, rows
from dirmerge.engine.compute import CPU, Compute
from dirmerge.engine.deltas import DeltaReader
from dirmerge.engine.result import Progress
from dirmerge.engine.work import merge_matrices
from dirmerge.errors import CheckpointError, MismatchError, NonFiniteError, OutputError, RecipeError

BASE = tiny_state()
TUNED = [tiny_state(seed, base=BASE) for seed in (1, 2, 3)]
MATRIX_NAMES = [f"{name}.weight" for name in MATRICES]


@pytest.fixture
def models(tmp_path):
    """Folders base, m0, m1, m2 of a tiny model and its fine-tunes."""
    write_model(tmp_path / "base", BASE)
    for t, state in enumerate(TUNED):
        write_model(tmp_path / f"m{t}", state)
    return tmp_path


def recipe(folder, count=3, method="tsv_m", **keys):
    names = [f"m{t}" for t in range(count)]
    models = keys.pop("models", [{"model": str(folder / name)} for name in names])
    return {"merge_method": method, "base_model": str(folder / "base"), "models": models, **keys}


def read_folder(folder: Path):
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(file)
    return state


def deltas(name, states=None, base=None):
    return [state[name].double() - (base or BASE)[name].double() for state in states or TUNED]


def mean(name, weights=(1, 1, 1)):
    total = sum(w * d for w, d in zip(weights, deltas(name), strict=True)) / sum(weights)
    return BASE[name].double() + total


def by_hand(name, method="tsv_m", scale=1.0, **options):
    """What the merge must give, from the public merge_deltas in float64."""
    if name in MATRIX_NAMES:
        merged = merge_deltas(deltas(name), method, **options).dense()
        return BASE[name].double() + scale * merged
    return mean(name)


def assert_close(found, expected, tolerance=1e-5):
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


def update_error(found, expected, base):
    """Relative error of the update, which a small delta on a large base would hide in the weights."""
    return float((found - expected).norm() / (expected - base.double()).norm())


@pytest.mark.parametrize("method", ["dc_merge", "mda", "tsv_m", "iso_c"])
def test_files_to_files_equals_the_methods_by_hand(models, method):
    result = api.merge(recipe(models, method=method, scale=0.7), models / "out")
    found = read_folder(models / "out")
    assert list(found) != []
    assert found.keys() == BASE.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        expected = by_hand(name, method, scale=0.7)
        assert update_error(value.double(), expected, BASE[name]) < 2e-4
    assert result.scale == 0.7
    assert result.scale_origin == "recipe"


def test_elementwise_methods_apply_lambda_to_every_tensor(models):
    result = api.merge(recipe(models, method="task_arithmetic", scale=0.5))
    for name in BASE:
        expected = BASE[name].double() + 0.5 * sum(deltas(name))
        assert_close(result.state_dict[name], expected, 1e-6)


def test_linear_is_the_weighted_mean_of_the_models(models):
    entries = [{"model": str(models / f"m{t}"), "parameters": {"weight": t + 1}} for t in range(3)]
    result = api.merge({"merge_method": "linear", "models": entries})
    for name in BASE:
        expected = sum((t + 1) * TUNED[t][name].double() for t in range(3)) / 6
        assert_close(result.state_dict[name], expected, 1e-6)


def test_alignment_reaches_its_target_with_one_scale(models):
    result = api.merge(recipe(models, alignment=0.6))
    numerator = denominator = 0.0
    for name in MATRIX_NAMES:
        update = result.state_dict[name].double() - BASE[name].double()
        for d in deltas(name):
            u, s, vh = torch.linalg.svd(d)
            r = min(d.shape) // 3
            numerator += float(((u[:, :r].mT @ update @ vh[:r].mT).diagonal() * s[:r]).sum())
            denominator += float(s[:r].square().sum())
    assert numerator / denominator == pytest.approx(0.6, rel=1e-3)
    assert result.alignment == pytest.approx(0.6)
    assert {record.scale for record in result.records if record.rule == "merge"} == {result.scale}
    raw = api.merge(recipe(models, scale=result.scale))
    for name in BASE:
        assert_close(result.state_dict[name], raw.state_dict[name].double(), 1e-6)


def test_weight_0_leaves_a_model_out(models):
    entries = [{"model": str(models / f"m{t}"), "parameters": {"weight": float(t != 1)}} for t in range(3)]
    without = [entries[0], entries[2]]
    for keys in ({"scale": 1.0}, {"alignment": 0.6}, {"alignment": 0.6, "alignment_per": "parameter"}):
        found = api.merge(recipe(models, models=entries, **keys))
        expected = api.merge(recipe(models, models=without, **keys))
        assert found.scale == expected.scale
        for name in BASE:
            assert torch.equal(found.state_dict[name], expected.state_dict[name])


def test_alignment_per_parameter(models):
    result = api.merge(recipe(models, alignment=0.6, alignment_per="parameter"))
    scales = [record.scale for record in result.records if record.rule == "merge"]
    assert len(set(scales)) == len(MATRIX_NAMES)
    assert result.scale is None
    name = MATRIX_NAMES[0]
    own = merge_deltas(deltas(name), "tsv_m", alignment=0.6)
    assert_close(result.state_dict[name], BASE[name].double() + own.dense())
    assert "λ from" in result.summary()


def test_the_default_scale_is_reported(models):
    result = api.merge(recipe(models))
    assert result.scale > 0
    assert "default of tsv_m for full fine-tunes, T = 3" in result.summary()
    assert f"{result.scale:.4g}" in result.summary()


def test_a_task_of_weight_zero_does_not_count_for_the_default_scale(models):
    entries: list[dict[str, Any]] = [{"model": str(models / f"m{t}")} for t in range(3)]
    entries[1]["parameters"] = {"weight": 0}
    absent = api.merge(recipe(models, models=[entries[0], entries[2]], method="dc_merge"))
    zero = api.merge(recipe(models, models=entries, method="dc_merge"))
    assert zero.scale == absent.scale
    assert "T = 2" in zero.summary()
    entries[1]["parameters"] = {"weight": [{"filter": "mlp", "value": 1}, {"value": 0}]}
    assert "T = 3" in api.merge(recipe(models, models=entries, method="dc_merge")).summary()


def test_sharded_in_and_out(models):
    whole = api.merge(recipe(models), models / "whole")
    for t, state in enumerate(TUNED):
        for file in (models / f"m{t}").iterdir():
            file.unlink()
        write_model(models / f"m{t}", state, shards=3)
    api.merge(recipe(models, shard_size="3KB"), models / "sharded")
    assert (models / "whole" / "model.safetensors").is_file()
    index = json.loads((models / "sharded" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, many = read_folder(models / "whole"), read_folder(models / "sharded")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in many.values())
    assert whole.path == models / "whole"


def test_the_same_bytes_twice(models):
    for out in ("one", "two"):
        api.merge(recipe(models, method="dc_merge", parameters={"svd": "randomized"}), models / out)
    one, two = ((models / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_chunks_of_rows_change_nothing(models, monkeypatch):
    entries = {"tensors": [{"match": "lm_head.*", "rule": "take", "model": 1}]}
    whole = api.merge(recipe(models, method="iso_c", **entries))
    chunked_whole = api.merge(recipe(models, method="ties", **entries))
    monkeypatch.setattr(rows, "CHUNK_BYTES", 4 * 16 * 5)
    for method, reference in (("iso_c", whole), ("ties", chunked_whole)):
        chunked = api.merge(recipe(models, method=method, **entries), models / method)
        found = read_folder(chunked.path)
        for name, value in reference.state_dict.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole.state_dict["lm_head.weight"], TUNED[1]["lm_head.weight"])


def test_output_dtype_is_rounded_once_to_nearest_even(models):
    full = api.merge(recipe(models, scale=1.0)).state_dict
    half = api.merge(recipe(models, scale=1.0, out_dtype="bfloat16"), models / "out")
    found = read_folder(half.path)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, full[name].to(torch.bfloat16))
    assert json.loads((models / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_bfloat16_models_stay_bfloat16(tmp_path):
    base = tiny_state(dtype=torch.bfloat16)
    states = [tiny_state(seed, torch.bfloat16, base=base, size=0.1) for seed in (1, 2)]
    result = api.merge(
        {"merge_method": "average", "base_model": base, "models": [{"model": state} for state in states]}
    )
    for name, value in result.state_dict.items():
        expected = (states[0][name].float() + states[1][name].float()) / 2
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), expected, rtol=2**-8, atol=1e-6)


def test_float64_models_are_merged_in_float64():
    base = {name: value.double() for name, value in BASE.items()}
    states = [{name: value.double() for name, value in state.items()} for state in TUNED]
    for keys in ({"scale": 0.7}, {"alignment": 0.6}):
        result = api.merge(
            {"merge_method": "iso_c", "base_model": base, "models": [{"model": s} for s in states], **keys}
        )
        for name in BASE:
            expected = by_hand(name, "iso_c", result.scale)
            assert result.state_dict[name].dtype == torch.float64
            assert update_error(result.state_dict[name], expected, BASE[name]) < 1e-9


@pytest.mark.parametrize(
    "keys",
    [
        {"scale": 0.5},
        {"alignment": 0.6},
        {"alignment": 0.6, "alignment_per": "parameter"},
        {"scale": 1.0, "tensors": [{"match": "*.weight", "rule": "mean"}]},
        {"scale": 1.0, "tensors": [{"match": "*_proj.weight", "rule": "take", "model": 0}]},
    ],
)
def test_a_float64_base_keeps_its_precision_beside_float32_adapters(tmp_path, keys):
    """Rows in which the updates are 0 come back bit for bit."""
    base = {name: value.double() + 1e-12 for name, value in BASE.items()}
    for t in range(2):
        # Of full rank, so that the update is dense where it waits for λ.
        write_adapter_folder(tmp_path / f"a{t}", rank=16, seed=t)
        file = tmp_path / f"a{t}" / "adapter_model.safetensors"
        factors = load_file(file)
        for name, value in factors.items():
            if "lora_B" in name:
                value[8:] = 0
        save_file(factors, file)
    models = [{"model": str(tmp_path / f"a{t}")} for t in range(2)]
    rule = {"merge_method": "task_arithmetic", "base_model": base, "models": models, **keys}
    found = api.merge(rule).state_dict
    for name in MATRIX_NAMES:
        assert found[name].dtype == torch.float64
        assert not torch.equal(found[name][:8], base[name][:8])
        assert torch.equal(found[name][8:], base[name][8:])


def test_scalars_and_empty_tensors():
    base = {"logit_scale": torch.tensor(2.0), "empty": torch.zeros(0, 3), "w": BASE["norm.weight"]}
    tuned = {"logit_scale": torch.tensor(4.0), "empty": torch.zeros(0, 3), "w": TUNED[0]["norm.weight"]}
    for method in ("average", "ties", "task_arithmetic", "tsv_m"):
        recipe = {"merge_method": method, "base_model": base, "models": [{"model": tuned}], "scale": 1.0}
        found = api.merge(recipe).state_dict
        assert found["logit_scale"] == 4
        assert found["empty"].shape == (0, 3)


def test_rows_of_a_state_dict_count_as_their_own_bytes(models):
    for base in (BASE, str(models / "base")):
        plan = api.plan({**recipe(models), "base_model": base})
        reader = DeltaReader.of(plan)
        for start, stop in ((2, 5), (0, 0), (None, None)):
            read = reader.base_read("embed_tokens.weight", start, stop)
            assert read.nbytes == reader.fetch(read).nbytes
        plan.close()


def test_state_dicts_are_left_as_they_are():
    states = [{name: value.clone() for name, value in state.items()} for state in TUNED]
    base = {name: value.clone() for name, value in BASE.items()}
    api.merge({"merge_method": "tsv_m", "base_model": base, "models": [{"model": s} for s in states]})
    assert all(torch.equal(base[name], BASE[name]) for name in BASE)
    assert all(torch.equal(states[1][name], TUNED[1][name]) for name in BASE)


def test_expert_stacks_are_merged_matrix_by_matrix(tmp_path):
    generator = torch.Generator().manual_seed(5)
    name = "layers.0.mlp.experts.gate_up_proj"
    base = {name: torch.randn(4, 8, 6, generator=generator)}
    states = [{name: base[name] + 0.1 * torch.randn(4, 8, 6, generator=generator)} for _ in range(2)]
    for folder, state in (("base", base), ("m0", states[0]), ("m1", states[1])):
        write_model(tmp_path / folder, state)
    for keys in ({"scale": 0.9}, {"alignment": 0.7}, {"alignment": 0.7, "alignment_per": "parameter"}):
        for method in ("tsv_m", "iso_c"):
            result = api.merge(recipe(tmp_path, 2, method=method, **keys), tmp_path / "out", overwrite=True)
            found = read_folder(tmp_path / "out")[name].double()
            for i in range(4):
                pair = [state[name][i].double() - base[name][i].double() for state in states]
                expected = base[name][i].double() + result.scale * merge_deltas(pair, method).dense()
                assert_close(found[i], expected)


@pytest.mark.parametrize("fewest", [5, 6, 7])  # rows: fewer than the base's six, as many, more
def test_common_rows(fewest):
    generator = torch.Generator().manual_seed(6)
    base = {
        "embed_tokens.weight": torch.randn(6, 3, generator=generator),
        **{n: BASE[n] for n in MATRIX_NAMES},
    }
    tuned = []
    for height, state in ((fewest, TUNED[0]), (8, TUNED[1])):
        tuned.append(
            {
                "embed_tokens.weight": torch.randn(height, 3, generator=generator),
                **{n: state[n] for n in MATRIX_NAMES},
            }
        )
    entries = [{"model": state, "parameters": {"weight": w}} for state, w in zip(tuned, (1, 3), strict=True)]
    result = api.merge(
        {
            "merge_method": "tsv_m",
            "base_model": base,
            "models": entries,
            "tensors": [{"match": "embed_tokens.weight", "rule": "common_rows"}],
        }
    )
    found = result.state_dict["embed_tokens.weight"]
    common = min(fewest, 6)
    expected = (tuned[0]["embed_tokens.weight"][:common] + 3 * tuned[1]["embed_tokens.weight"][:common]) / 4
    torch.testing.assert_close(found[:common], expected)
    assert torch.equal(found[common:], base["embed_tokens.weight"][common:])
    notes = next(record.notes for record in result.records if record.name == "embed_tokens.weight")
    assert any("rows 6:8" in note for note in notes)
    assert any("rows 5:6" in note for note in notes) == (fewest == 5)


def test_tied_weights_must_be_equal(models):
    config = {"tie_word_embeddings": True}
    for name, state in {"base": BASE, "m0": TUNED[0], "m1": TUNED[1], "m2": TUNED[2]}.items():
        tied = {**state, "lm_head.weight": state["embed_tokens.weight"].clone()}
        write_model(models / name, tied, config=config)
    api.merge(recipe(models), models / "out")
    assert "lm_head.weight" not in read_folder(models / "out")
    write_model(models / "m1", TUNED[1], config=config)
    with pytest.raises(MismatchError, match=r"m1: lm_head\.weight is declared to be tied to"):
        api.merge(recipe(models), models / "again")
    assert not (models / "again").exists()
    separate = {"tensors": [{"match": "lm_head.weight", "rule": "mean"}]}
    api.merge(recipe(models, **separate), models / "again")
    assert "lm_head.weight" in read_folder(models / "again")


def test_tied_state_dicts_come_back_tied():
    def tied(state):
        return {**state, "lm_head.weight": state["embed_tokens.weight"]}

    result = api.merge(
        {"merge_method": "average", "base_model": tied(BASE), "models": [{"model": tied(s)} for s in TUNED]}
    )
    state = result.state_dict
    assert state["lm_head.weight"].data_ptr() == state["embed_tokens.weight"].data_ptr()
    assert list(state) == list(BASE)


def test_integers_that_differ_are_an_error(models):
    for t, name in enumerate(("base", "m0", "m1", "m2")):
        state = {**(TUNED[t - 1] if t else BASE), "position_ids": torch.arange(5) + (t == 3)}
        write_model(models / name, state)
    with pytest.raises(MismatchError, match=r"integers differ between the base and .*m2"):
        api.merge(recipe(models), models / "out")
    assert not (models / "out").exists()
    result = api.merge(recipe(models, tensors=[{"match": "position_ids", "rule": "base"}]))
    assert torch.equal(result.state_dict["position_ids"], torch.arange(5))


def test_zero_deltas_give_the_base(models):
    copies = [{"model": str(models / f"copy{t}")} for t in range(2)]
    for t in range(2):
        write_model(models / f"copy{t}", BASE)
    for method in ("dc_merge", "tsv_m", "mda", "iso_c", "iso_cts", "wudi", "ties", "average"):
        result = api.merge(recipe(models, models=copies, method=method))
        assert all(torch.equal(result.state_dict[name], BASE[name]) for name in BASE), method


def test_one_model_and_more_models_than_the_rank_allows(models):
    single = api.merge(recipe(models, 1, scale=1.0, parameters={"rank": 16}))
    for name in MATRIX_NAMES:
        assert_close(single.state_dict[name], TUNED[0][name].double())
    many = [{"model": str(models / f"m{t % 3}")} for t in range(20)]
    result = api.merge(recipe(models, models=many))
    assert all(bool(value.isfinite().all()) for value in result.state_dict.values())


def write_adapters(folder, ranks=(2, 3), **config):
    return [
        write_adapter_folder(folder / f"m{t}", rank=rank, seed=t, **config) for t, rank in enumerate(ranks)
    ]


def clear(models):
    for t in range(3):
        for file in (models / f"m{t}").iterdir():
            file.unlink()


@pytest.mark.parametrize("method", ["dc_merge", "tsv_m", "average", "ties"])
def test_adapters_onto_a_base(models, method):
    clear(models)
    updates = write_adapters(models, use_rslora=True)
    result = api.merge(recipe(models, 2, method=method, scale=0.8), models / "out")
    found = read_folder(models / "out")
    assert found.keys() == BASE.keys()
    for name in BASE:
        if name in MATRIX_NAMES:
            pair = [low_rank(u[name], r) for u, r in zip(updates, (2, 3), strict=True)]
            expected = BASE[name].double() + 0.8 * merge_deltas(pair, method).dense()
            assert update_error(found[name].double(), expected, BASE[name]) < 1e-4
        else:
            assert torch.equal(found[name], BASE[name])
    assert result.rules == {"merge": len(MATRIX_NAMES), "base": len(BASE) - len(MATRIX_NAMES)}


def low_rank(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return LowRank(u[:, :rank] * s[:rank], None, vh[:rank].mT.contiguous())


def test_saved_modules_and_biases_of_adapters(models):
    clear(models)
    saved = [{"norm.weight": torch.full((16,), float(t))} for t in range(2)]
    for t in range(2):
        write_adapter_folder(models / f"m{t}", seed=t, saved=saved[t], modules_to_save=["norm"])
    result = api.merge(recipe(models, 2))
    torch.testing.assert_close(result.state_dict["norm.weight"], torch.full((16,), 0.5))


def test_adapter_on_a_fine_tune(models):
    updates = write_adapter_folder(models / "adapter")
    entries = [{"model": f"{models / name}+{models / 'adapter'}"} for name in ("m0", "base")]
    result = api.merge(recipe(models, models=entries, method="average"))
    for name in BASE:
        update = updates.get(name, torch.zeros(()).double())
        own = TUNED[0][name].double() + update
        other = BASE[name].double() + update
        assert_close(result.state_dict[name], (own + other) / 2, 1e-6)
    taken = api.merge(recipe(models, models=entries, tensors=[{"match": "*", "rule": "take", "model": 0}]))
    for name in BASE:
        expected = TUNED[0][name].double() + updates.get(name, torch.zeros(()).double())
        assert_close(taken.state_dict[name], expected, 1e-6)


def test_adapter_beside_a_full_model(models):
    clear_one = models / "m1"
    for file in clear_one.iterdir():
        file.unlink()
    updates = write_adapter_folder(clear_one)
    result = api.merge(recipe(models, 2, method="average"))
    for name in BASE:
        second = BASE[name].double() + updates.get(name, torch.zeros(()).double())
        assert_close(result.state_dict[name], (TUNED[0][name].double() + second) / 2, 1e-6)


def adapter_updates(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: tensors[f"base_model.model.{name[:-7]}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{name[:-7]}.lora_A.weight"].double()
        for name in MATRIX_NAMES
    }


@pytest.mark.parametrize("keys", [{"scale": 0.8}, {}])
def test_adapters_into_one_adapter(models, keys):
    clear(models)
    updates = write_adapters(models)
    plain = recipe(models, 2, method="dc_merge", **keys)
    del plain["base_model"]
    result = api.merge(plain, models / "out", as_adapter=True)
    found = adapter_updates(models / "out")
    config = json.loads((models / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["base_model_name_or_path"] == "tiny/base"
    for name in MATRIX_NAMES:
        pair = [low_rank(u[name], r) for u, r in zip(updates, (2, 3), strict=True)]
        expected = result.scale * merge_deltas(pair, "dc_merge").dense()
        assert float((found[name] - expected).norm() / expected.norm()) < 1e-4
    assert not (models / "out" / "model.safetensors").exists()


def test_adapter_of_a_chosen_rank_reports_the_energy_it_keeps(models):
    clear(models)
    updates = write_adapters(models)
    plain = recipe(models, 2, method="task_arithmetic", scale=1.0)
    result = api.merge(plain, models / "out", as_adapter=True, rank=2)
    found = adapter_updates(models / "out")
    for record in result.records:
        exact = updates[0][record.name] + updates[1][record.name]
        s = torch.linalg.svdvals(exact)
        assert record.rank == 2
        assert record.kept_energy == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-4)
        best = low_rank(exact, 2).dense()
        assert float((found[record.name] - best).norm() / best.norm()) < 1e-4


def test_dense_methods_give_an_adapter_of_a_chosen_rank(models):
    clear(models)
    updates = write_adapters(models)
    api.merge(recipe(models, 2, method="ties", scale=1.0), models / "out", as_adapter=True, rank=3)
    found = adapter_updates(models / "out")
    name = MATRIX_NAMES[1]
    exact = merge_deltas([u[name] for u in updates], "ties").dense()
    best = low_rank(exact, 3).dense()
    assert float((found[name] - best).norm() / best.norm()) < 1e-3


def corrupt(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[:-10])
        case "lying header":
            length = int.from_bytes(content[:8], "little")
            header = content[8 : 8 + length].replace(b'"shape":[16,16]', b'"shape":[16,61]')
            path.write_bytes(content[:8] + header + content[8 + length :])
        case "absurd header":
            path.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])


@pytest.mark.parametrize("how", ["truncated", "lying header", "absurd header"])
def test_malformed_files(models, how):
    corrupt(models / "m1" / "model.safetensors", how)
    with pytest.raises(CheckpointError, match=r"m1.model\.safetensors"):
        api.merge(recipe(models), models / "out")
    assert_no_output(models)


def assert_no_output(folder: Path) -> None:
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["base", "m0", "m1", "m2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [MATRIX_NAMES[0], "norm.weight"])
@pytest.mark.parametrize("where", ["base", "m2"])
def test_non_finite_values_name_file_and_tensor(models, where, name, value):
    state = dict(BASE if where == "base" else TUNED[2])
    state[name] = state[name].clone()
    state[name].view(-1)[3] = value
    write_model(models / where, state)
    expected = re.escape(f"{where}/model.safetensors: tensor '{name}' holds NaN or Inf")
    for method in ("tsv_m", "ties"):
        with pytest.raises(NonFiniteError, match=expected):
            api.merge(recipe(models, method=method), models / "out")
    assert_no_output(models)


def test_nan_in_an_adapter(models):
    clear(models)
    write_adapters(models)
    tensors = load_file(models / "m1" / "adapter_model.safetensors")
    key = f"base_model.model.{MATRIX_NAMES[0][:-7]}.lora_A.weight"
    tensors[key][0, 0] = float("nan")
    save_file(tensors, models / "m1" / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=re.escape(key)):
        api.merge(recipe(models, 2), models / "out")
    assert_no_output(models)


def test_overflow_of_the_output_dtype(models):
    big = {name: value * 1e5 for name, value in BASE.items()}
    write_model(models / "base", big)
    for t in range(3):
        write_model(models / f"m{t}", tiny_state(t, base=big))
    with pytest.raises(NonFiniteError, match="not finite in float16; choose a wider out_dtype"):
        api.merge(recipe(models, out_dtype="float16"), models / "out")
    assert_no_output(models)


def test_an_existing_output_is_kept(models):
    out = models / "m2"
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists and is not empty"):
        api.merge(recipe(models, 2), out)
    with pytest.raises(OutputError, match="was not written by dirmerge"):
        api.merge(recipe(models, 2), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert_no_output(models)


def test_overwriting_loses_no_input(models):
    merged = models / "merged"
    api.merge(recipe(models, 2), merged)
    again = recipe(models, 2)
    again["models"][0]["model"] = str(merged)
    before = (merged / "model.safetensors").read_bytes()
    for out in (merged, models):
        with pytest.raises(OutputError, match=r"holds the input|was not written by dirmerge"):
            api.merge(again, out, overwrite=True)
    assert (merged / "model.safetensors").read_bytes() == before
    inner = merged / "inner"
    api.merge(recipe(models, 2), inner)
    with pytest.raises(OutputError, match="lies in the input"):
        api.merge(again, inner, overwrite=True)
    (merged / "recipe.yml").write_text(yaml.safe_dump(recipe(models, 2)))
    with pytest.raises(OutputError, match=r"holds the input .*recipe.yml"):
        api.merge(merged / "recipe.yml", merged, overwrite=True)
    api.merge(recipe(models, 3), merged, overwrite=True)
    assert (merged / "model.safetensors").read_bytes() != before
    assert not inner.exists()


def test_an_update_against_the_tasks_has_no_alignment(models):
    reverse = {name: 2 * BASE[name] - TUNED[0][name] for name in BASE}
    write_model(models / "m1", reverse)
    with pytest.raises(RecipeError, match="give a raw scale instead"):
        api.merge(recipe(models, 2, method="task_arithmetic", alignment=0.5), models / "out")
    assert_no_output(models)


def test_an_adapter_needs_a_folder(models):
    clear(models)
    write_adapters(models)
    with pytest.raises(ValueError, match="out must name a folder"):
        api.merge(recipe(models, 2), as_adapter=True)


def test_documents_and_side_files(models):
    api.merge(recipe(models, method="dc_merge", alignment=0.5), models / "out")
    names = {path.name for path in (models / "out").iterdir()}
    beside = {"README.md", "dirmerge.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {"model.safetensors", *beside}
    manifest = json.loads((models / "out" / "dirmerge.json").read_text())
    weights = models / "m1" / "model.safetensors"
    digest = blake3(weights.read_bytes()).hexdigest()
    assert manifest["inputs"][2]["files"] == [{"name": "model.safetensors", "blake3": digest}]
    assert manifest["scale"]["value"] > 0
    assert manifest["scale"]["alignment"] == pytest.approx(0.5)
    assert {record["name"] for record in manifest["tensors"]} == BASE.keys()
    merged = next(record for record in manifest["tensors"] if record["name"] == MATRIX_NAMES[0])
    assert len(merged["energy"]) == 3
    card = (models / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model_relation: merge\nlibrary_name: transformers\n")
    assert digest in card
    assert "dc_merge" in card
    assert "alignment: 0.5" in card  # the recipe


def test_tokenizer_of_a_listed_model_and_chat_template(models):
    (models / "m1" / "tokenizer.json").write_text('{"other": 1}')
    (models / "m1" / "tokenizer_config.json").write_text('{"chat_template": "old", "x": 1}')
    (models / "m1" / "vocab.txt").write_text("a")
    keys = {"tokenizer": {"source": str(models / "m1")}, "chat_template": "{{ messages }}"}
    api.merge(recipe(models, **keys), models / "out")
    assert (models / "out" / "tokenizer.json").read_text() == '{"other": 1}'
    assert (models / "out" / "vocab.txt").read_text() == "a"
    assert (models / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((models / "out" / "tokenizer_config.json").read_text()) == {"x": 1}


def test_chat_template_auto_takes_the_most_common(models):
    for t, template in enumerate(("one", "two", "two")):
        (models / f"m{t}" / "chat_template.jinja").write_text(template)
    api.merge(recipe(models, chat_template="auto"), models / "out")
    assert (models / "out" / "chat_template.jinja").read_text() == "two"
    for t in range(3):
        (models / f"m{t}" / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="finds no model with a chat template"):
        api.merge(recipe(models, chat_template="auto"), models / "none")
    assert not (models / "none").exists()


def test_progress_counts_every_tensor_in_both_passes(models):
    steps: list[Progress] = []
    api.merge(recipe(models), models / "out", progress=steps.append)
    assert [step.done for step in steps] == list(range(1, len(MATRIX_NAMES) + len(BASE) + 1))
    assert steps[-1].work == pytest.approx(1)
    assert steps[-1].written_bytes == steps[-1].output_bytes == sum(v.nbytes for v in BASE.values())
    assert {step.phase for step in steps} == {"merge", "write"}


@pytest.mark.parametrize(
    "keys", [{"method": "task_arithmetic"}, {"method": "ties"}, {"method": "iso_cts", "scale": 1}]
)
def test_every_byte_of_the_inputs_is_read_once(models, keys):
    result = api.merge(recipe(models, **keys), models / "out")
    sizes = sum((models / name / "model.safetensors").stat().st_size for name in ("base", "m0", "m1", "m2"))
    assert result.read_bytes == sizes
    assert json.loads((models / "out" / "dirmerge.json").read_text())["read_bytes"] == sizes
    for path, digest in result.hashes.items():
        assert digest == blake3(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("per", ["model", "parameter"])
def test_where_the_scale_is_found_only_the_base_is_read_twice(models, per):
    result = api.merge(recipe(models, method="dc_merge", alignment=0.5, alignment_per=per), models / "out")
    sizes = sum((models / name / "model.safetensors").stat().st_size for name in ("base", "m0", "m1", "m2"))
    again = sum(4 * math.prod(MATRICES[name.removesuffix(".weight")]) for name in MATRIX_NAMES)
    assert result.read_bytes == sizes + again


def test_a_file_that_changed_since_it_was_planned_is_an_error(models):
    """Also one that is read for its hash alone, which must be that of what was planned."""
    entries = [{"model": str(models / f"m{t}"), "parameters": {"weight": float(t < 2)}} for t in range(3)]
    for changed in ("m0", "m2"):
        plan = api.plan(recipe(models, models=entries))
        file = models / changed / "model.safetensors"
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(1, 1))
        with pytest.raises(CheckpointError, match=rf"{changed}/model\.safetensors: was changed"):
            pipeline.run(plan, compute=Compute((CPU,), 1, None, "asked for"))


def test_an_update_is_let_go_of_with_its_last_row(models):
    """Items that are made while an earlier one still waits for its file would hold theirs meanwhile."""
    name = "layers.0.mlp.up_proj.weight"
    plan = api.plan(recipe(models, alignment=0.6))
    reader = DeltaReader.of(plan)
    tensor = next(tensor for tensor in plan.tensors if tensor.name == name)
    update = torch.ones(24, 16)
    rule = merged_rows.UpdatedRows(reader, tensor, {None: lambda: update}, 0.5)
    for start, stop, here in ((0, 10, True), (20, 24, True), (10, 20, False)):
        values = [reader.fetch(read) for read in rule.reads(start, stop)]
        made = rule.make(values, start, stop).value
        assert torch.equal(made, BASE[name][start:stop] + 0.5)
        assert (rule._updates[None]._value is not None) == here
    plan.close()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "average"])
def test_rows_from_the_stored_weights_equal_the_method(models, method, monkeypatch):
    """The pass over rows gives what merge_deltas gives, chunk by chunk, whole or one fine-tune at a time."""
    entries = [{"model": str(models / f"m{t}"), "parameters": {"weight": 0.5 + t}} for t in range(3)]
    rule = recipe(models, method=method, models=entries, **({} if method == "average" else {"scale": 0.8}))
    for sizes in ({}, {"CHUNK_BYTES": 4 * 16 * 5}, {"CHUNK_BYTES": 4 * 16 * 5, "WHOLE_BYTES": 0}):
        for name, value in sizes.items():
            monkeypatch.setattr(rows if name == "CHUNK_BYTES" else merged_rows, name, value)
        found = api.merge(rule).state_dict
        for name, base in BASE.items():
            merged = merge_deltas(deltas(name), method, weights=[0.5, 1.5, 2.5]).dense()
            expected = base.double() + (1.0 if method == "average" else 0.8) * merged
            assert_close(found[name], expected, 1e-6)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("keys", [{"scale": 1.0}, {"alignment": 0.5}])
def test_an_interrupt_ends_every_thread_and_leaves_nothing(models, monkeypatch, lanes, keys):
    def slowly(*arguments, **options):
        time.sleep(0.05)
        return merge_matrices(*arguments, **options)

    def interrupt(step):
        if step.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "merge_matrices", slowly)
    before = {path.name for path in models.iterdir()}
    threads = threading.enumerate()
    compute = Compute((CPU,) * lanes, 1, None, "asked for")
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(api.plan(recipe(models, **keys)), models / "out", progress=interrupt, compute=compute)
    assert threading.enumerate() == threads
    assert {path.name for path in models.iterdir()} == before


@pytest.mark.parametrize("stage", ["read", "make", "write"])
def test_an_error_in_any_stage_stops_all_and_leaves_nothing(models, monkeypatch, stage):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if stage == "read":
        monkeypatch.setattr("dirmerge.checkpoints.files.fill", fail)
    elif stage == "make":
        monkeypatch.setattr(merged_rows.FormedRows, "make", fail)
    else:
        monkeypatch.setattr("os.pwrite", fail)
    before = {path.name for path in models.iterdir()}
    with pytest.raises((OSError, OutputError), match="No space left"):
        api.merge(recipe(models, method="ties"), models / "out")
    assert {path.name for path in models.iterdir()} == before
    assert not [t.name for t in threading.enumerate() if t.name.startswith("dirmerge")]
