"""Merged folders of real architectures, tiny and random: transformers loads them and computes the same."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import dirmerge
from dirmerge import api

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 67, "max_position_embeddings": 24}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3)), tokens()


def gpt2():
    config = transformers.GPT2Config(vocab_size=67, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), tokens()


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config), tokens()


def t5():
    config = transformers.T5Config(
        vocab_size=67, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    ids = tokens()["input_ids"]
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels()}


def clip():
    config = transformers.CLIPConfig(
        text_config={**TEXT, "projection_dim": 16},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    return transformers.CLIPModel(config), {**tokens(), "pixel_values": pixels()}


def mixtral():
    config = transformers.MixtralConfig(
        **TEXT, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config), tokens()


def tokens():
    return {"input_ids": torch.arange(20).reshape(2, 10) * 3 % 67}


def pixels():
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def output(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found.logits if hasattr(found, "logits") else found.logits_per_image


def fine_tune(model, seed):
    """A copy with every weight moved, tied ones together."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return tuned


def merged_by_hand(base, tuned, names, scale):
    """The merge of state dicts, tensor by tensor, by the public merge_deltas and by plain means."""
    states = [model.state_dict() for model in tuned]
    result = {}
    for name, value in base.state_dict().items():
        if not value.is_floating_point():
            result[name] = value
            continue
        deltas = [state[name].double() - value.double() for state in states]
        if name not in names:
            update = sum(deltas) / len(deltas)
        elif value.ndim == 3:
            matrices = [[d[i] for d in deltas] for i in range(len(value))]
            update = scale * torch.stack([dirmerge.merge_deltas(m, "tsv_m").dense() for m in matrices])
        else:
            update = scale * dirmerge.merge_deltas(deltas, "tsv_m").dense()
        result[name] = (value.double() + update).to(value.dtype)
    return result


@pytest.mark.parametrize("build", [bert, gpt2, llama, t5, vit, clip, mixtral])
def test_merged_folder_loads_and_computes_what_the_hand_merge_does(build, tmp_path):
    torch.manual_seed(0)
    base, inputs = build()
    tuned = [fine_tune(base, seed) for seed in (1, 2)]
    base.save_pretrained(tmp_path / "base")
    for t, model in enumerate(tuned):
        model.save_pretrained(tmp_path / f"m{t}")
    result = api.merge(
        {
            "merge_method": "tsv_m",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / "m0")}, {"model": str(tmp_path / "m1")}],
            "shard_size": "40KB",
        },
        tmp_path / "out",
    )
    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged_names = {record.name for record in result.records if record.rule == "merge"}
    assert len(merged_names) >= 8
    assert result.rules.keys() <= {"merge", "mean", "identical"}

    by_hand = copy.deepcopy(base)
    # Files and modules may name tensors differently (Mixtral's experts): compared by hand where they agree.
    if merged_names <= base.state_dict().keys():
        by_hand.load_state_dict(merged_by_hand(base, tuned, merged_names, result.scale))
        for name, value in by_hand.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output(loaded, inputs), output(by_hand, inputs), rtol=1e-4, atol=1e-4)
    difference = (output(loaded, inputs) - output(base, inputs)).norm()
    assert difference > 1e-3  # it is not the base


def test_folder_keeps_dtype_and_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    base, inputs = gpt2()
    tuned = [fine_tune(base, seed) for seed in (1, 2)]
    for name, model in {"base": base, "m0": tuned[0], "m1": tuned[1]}.items():
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    api.merge(
        {
            "merge_method": "average",
            "base_model": str(tmp_path / "base"),
            "models": [{"model": str(tmp_path / "m0")}, {"model": str(tmp_path / "m1")}],
        },
        tmp_path / "out",
    )
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    mean = (tuned[0].transformer.wte.weight.float() + tuned[1].transformer.wte.weight.float()) / 2
    torch.testing.assert_close(loaded.lm_head.weight.float(), mean, rtol=2**-8, atol=1e-4)
    assert output(loaded, inputs).isfinite().all()
