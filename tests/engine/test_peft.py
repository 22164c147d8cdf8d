"""Adapters made by PEFT: merged onto their base, and into one adapter that PEFT loads."""

from __future__ import annotations

import copy

import pytest
import torch

from dirmerge import api

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

INPUTS = {"input_ids": torch.arange(20).reshape(2, 10) * 3 % 67}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=67, n_positions=24, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def adapted(base, seed, **config):
    """The base with a LoRA adapter whose factors are both random."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


CASES = {
    "llama": (
        llama,
        [
            {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
            {
                "r": 3,
                "lora_alpha": 4,
                "target_modules": ["q_proj", "down_proj"],
                "use_rslora": True,
                "rank_pattern": {"down_proj": 5},
            },
        ],
    ),
    "gpt2": (
        gpt2,
        [
            {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"r": 4, "lora_alpha": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_and_their_base(case, tmp_path):
    build, configs = CASES[case]
    torch.manual_seed(0)
    base = build()
    base.save_pretrained(tmp_path / "base")
    sums = {name: torch.zeros_like(value) for name, value in base.state_dict().items()}
    for t, config in enumerate(configs):
        model = adapted(base, t + 1, **config)
        model.save_pretrained(tmp_path / f"m{t}")
        unloaded = model.merge_and_unload().state_dict()
        for name, value in base.state_dict().items():
            sums[name] += unloaded[name] - value
    expected = copy.deepcopy(base)
    expected.load_state_dict({n: v + 0.5 * sums[n] for n, v in base.state_dict().items()})
    recipe = {
        "merge_method": "task_arithmetic",
        "scale": 0.5,
        "models": [{"model": str(tmp_path / "m0")}, {"model": str(tmp_path / "m1")}],
    }

    api.merge({**recipe, "base_model": str(tmp_path / "base")}, tmp_path / "model")
    loaded = type(base).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-4)

    api.merge(recipe, tmp_path / "adapter", as_adapter=True)
    with_adapter = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(with_adapter), logits(expected), rtol=1e-4, atol=1e-4)
    assert (logits(expected) - logits(base)).norm() > 1e-2


def test_saved_modules_come_back_through_peft(tmp_path):
    torch.manual_seed(0)
    base = llama()
    saved = []
    for t in range(2):
        config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        model = adapted(base, t + 1, **config)
        with torch.no_grad():
            head = model.base_model.model.lm_head.modules_to_save["default"].weight
            head.copy_(torch.randn(head.shape))
        saved.append(head.clone())
        model.save_pretrained(tmp_path / f"m{t}")
    entries = [
        {"model": str(tmp_path / "m0"), "parameters": {"weight": 1}},
        {"model": str(tmp_path / "m1"), "parameters": {"weight": 3}},
    ]
    api.merge({"merge_method": "average", "models": entries}, tmp_path / "out", as_adapter=True)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
    head = loaded.base_model.model.lm_head.modules_to_save["default"].weight
    torch.testing.assert_close(head.detach(), (saved[0] + 3 * saved[1]).detach() / 4)
