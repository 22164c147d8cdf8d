"""Adapters against PEFT itself: what merge_and_unload adds, and what from_pretrained computes."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers import MATRICES, write_adapter_folder, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dirmerge.checkpoints.adapter_config import HARMLESS, REFUSED
from dirmerge.checkpoints.adapter_writer import AdapterModule, AdapterWriter, write_adapter
from dirmerge.checkpoints.adapters import Adapter, is_adapter, open_adapter
from dirmerge.checkpoints.reader import open_checkpoint
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import CheckpointError, MismatchError, NonFiniteError, OutputError


def bert() -> transformers.BertForSequenceClassification:
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=3,  # type: ignore[call-arg]  # a field of the base class, which the stub hides
            initializer_range=0.3,
        )
    ).eval()


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    ).eval()


def llama(layers: int = 2) -> transformers.LlamaForCausalLM:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            initializer_range=0.3,
            tie_word_embeddings=False,
        )
    ).eval()


def train(model: nn.Module) -> None:
    """Stands for training: every trainable parameter becomes random."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def saved_and_merged(model: nn.Module, config: LoraConfig, folder: Path) -> dict[str, Tensor]:
    """Trains and saves an adapter with PEFT; returns the state dict of PEFT's merged model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        train(adapted)
        adapted.save_pretrained(str(folder))
        return {name: value.clone() for name, value in adapted.merge_and_unload().state_dict().items()}


def applied(base: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """What we take the fine-tuned model to be."""
    result = dict(base)
    files = load_file(adapter.files[1])
    for name, info in adapter.saved.items():
        result[name] = files[info.name]
    for target in adapter.targets.values():
        result[target.name] = base[target.name] + target.read().dense()
    return result


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (bert, {"r": 4, "lora_alpha": 10, "target_modules": ["query", "value"]}),
    "rslora": (bert, {"r": 4, "lora_alpha": 10, "target_modules": ["query", "dense"], "use_rslora": True}),
    "patterns": (
        bert,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["query", "key", "value", "output.dense"],
            # The first that matches wins; these are in the order in which PEFT saves them (sorted).
            "rank_pattern": {
                "^bert.*dense": 5,
                r"layer.1.attention.self.query": 2,
                r"layer.\d.attention.self..*": 3,
            },
            "alpha_pattern": {r"layer\.\d\.attention\.self\.value": 20, "query": 1},
        },
    ),
    "rslora with patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "use_rslora": True,
        },
    ),
    "conv1d": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, unstated": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj"]}),
    "conv1d, square only": (gpt2, {"r": 3, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "embedding": (bert, {"r": 3, "target_modules": ["word_embeddings", "query"]}),
    "embedding with its copy": (llama, {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": (
        bert,
        {"r": 3, "target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]},
    ),
    "task type with a head": (bert, {"r": 3, "target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias all": (bert, {"r": 3, "target_modules": ["query", "value"], "bias": "all"}),
    "bias lora_only": (bert, {"r": 3, "target_modules": ["query", "value"], "bias": "lora_only"}),
    "lm_head": (llama, {"r": 3, "target_modules": ["lm_head", "v_proj"]}),
    "all linear": (llama, {"r": 3, "target_modules": "all-linear"}),
    "mica": (llama, {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "orthogonal": (llama, {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


class TestReadingAgainstPeft:
    @pytest.mark.parametrize("case", CASES)
    def test_base_plus_update_is_the_merged_model(self, tmp_path: Path, case: str) -> None:
        build, options = CASES[case]
        model = build()
        base = {name: value.clone() for name, value in model.state_dict().items()}
        merged = saved_and_merged(model, LoraConfig(**options), tmp_path)
        adapter = open_adapter(tmp_path).orient({name: value.shape for name, value in base.items()})
        adapter.check_base_copies(open_checkpoint(base))
        ours = applied(base, adapter)
        assert ours.keys() == merged.keys()
        changed = [name for name in base if not torch.equal(base[name], merged[name])]
        assert set(changed) == {target.name for target in adapter.targets.values()} | adapter.saved.keys()
        for name, value in merged.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6, msg=f"{case}: {name}")

    def test_patterns_case_is_not_trivial(self, tmp_path: Path) -> None:
        _, options = CASES["patterns"]
        saved_and_merged(bert(), LoraConfig(**options), tmp_path)
        targets = open_adapter(tmp_path).targets
        prefix = "bert.encoder.layer.1.attention.self"
        assert [targets[f"{prefix}.{leaf}"].rank for leaf in ("query", "key", "value")] == [2, 3, 3]
        assert targets["bert.encoder.layer.0.attention.self.query"].rank == 3
        assert targets["bert.encoder.layer.1.output.dense"].rank == 5
        assert targets[f"{prefix}.query"].scaling == 1 / 2
        assert targets[f"{prefix}.value"].scaling == 20 / 3

    def test_overlapping_patterns_mean_what_peft_loads(self, tmp_path: Path) -> None:
        # PEFT sorts the patterns when it saves, so the file may mean something else than the model in
        # training did.
        alphas = {"query": 1, "layer.1.attention.self.query": 50}
        saved_and_merged(bert(), LoraConfig(r=2, target_modules=["query"], alpha_pattern=alphas), tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(bert(), tmp_path).merge_and_unload().state_dict()
        ours = applied(bert().state_dict(), open_adapter(tmp_path))
        for name, value in loaded.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)

    def test_embedding_copy_is_found_and_compared(self, tmp_path: Path) -> None:
        model = llama()
        base = {name: value.clone() for name, value in model.state_dict().items()}
        saved_and_merged(model, LoraConfig(r=3, target_modules=["embed_tokens"]), tmp_path)
        adapter = open_adapter(tmp_path)
        name = "model.embed_tokens.weight"
        assert adapter.base_copies.keys() == {name}
        assert adapter.saved == {}
        rounded = {key: value.bfloat16() for key, value in base.items()}
        adapter.check_base_copies(open_checkpoint(rounded), max_bytes=100)
        other = base | {name: base[name].clone()}
        other[name][-1, -1] += 1
        with pytest.raises(MismatchError, match=r"'model\.embed_tokens\.weight' that differ"):
            adapter.check_base_copies(open_checkpoint(other), max_bytes=100)
        with pytest.raises(MismatchError, match=r"shape \(39, 16\): was the vocabulary resized"):
            adapter.check_base_copies(open_checkpoint(base | {name: base[name][:39]}))
        with pytest.raises(MismatchError, match="no such tensor"):
            adapter.check_base_copies(open_checkpoint({"x": torch.zeros(1)}))

    def test_dora_is_refused(self, tmp_path: Path) -> None:
        saved_and_merged(bert(), LoraConfig(r=3, target_modules=["query"], use_dora=True), tmp_path)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json: uses DoRA.*merge_and_unload"):
            open_adapter(tmp_path)
        # also when only the tensors tell
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        write_json(tmp_path / "adapter_config.json", config | {"use_dora": False})
        with pytest.raises(CheckpointError, match="uses DoRA"):
            open_adapter(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lora_bias": True}, "lora_bias"),
            ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which changes the base weights"),
            ({"init_lora_weights": "olora"}, "initialised by 'olora'"),
        ],
    )
    def test_other_variants_are_refused(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        saved_and_merged(bert(), LoraConfig(r=3, target_modules=["query"], **options), tmp_path)
        with pytest.raises(CheckpointError, match=message):
            open_adapter(tmp_path)

    def test_convolutions_are_refused(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        saved_and_merged(model, LoraConfig(r=2, target_modules=["0"]), tmp_path)
        with pytest.raises(CheckpointError, match="module '0': is LoRA on a convolution"):
            open_adapter(tmp_path)

    def test_target_parameters_are_refused(self, tmp_path: Path) -> None:
        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Parameter(torch.randn(4, 8, 6))
                self.down = nn.Parameter(torch.randn(4, 6, 8))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.up[0] @ self.down[0]

        model = nn.Sequential(Experts())
        config = LoraConfig(r=2, target_modules=[], target_parameters=["0.up", "0.down"])
        saved_and_merged(model, config, tmp_path)
        with pytest.raises(CheckpointError, match="fused experts"):
            open_adapter(tmp_path)
        # also when only the tensors tell
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        write_json(tmp_path / "adapter_config.json", content | {"target_parameters": None})
        with pytest.raises(
            CheckpointError, match=r"base_layer\.lora_A.*is of a kind that dirmerge does not know"
        ):
            open_adapter(tmp_path)

    def test_every_option_of_peft_is_classified(self) -> None:
        options = {field.name for field in dataclasses.fields(LoraConfig)}
        assert options <= HARMLESS | REFUSED.keys(), f"new in PEFT {peft.__version__}"
        assert not HARMLESS & REFUSED.keys()

    def test_half_precision_factors_become_float32(self, tmp_path: Path) -> None:
        updates = write_adapter_folder(tmp_path, dtype=torch.bfloat16)
        for target in open_adapter(tmp_path).targets.values():
            update = target.read()
            assert update.dtype == torch.float32
            torch.testing.assert_close(update.dense().double(), updates[target.name], rtol=1e-5, atol=1e-7)


class TestOrientation:
    def mixed(
        self, folder: Path, kinds: dict[str, str]
    ) -> tuple[Adapter, dict[str, Tensor], dict[str, Tensor]]:
        model = gpt2()
        base = {name: value.clone() for name, value in model.state_dict().items()}
        merged = saved_and_merged(model, LoraConfig(r=3, target_modules=list(kinds)), folder)
        return open_adapter(folder), base, merged

    def test_one_flag_for_two_kinds(self, tmp_path: Path) -> None:
        # PEFT saves the flag of the last module, lm_head, so the one of c_attn is wrong in the file.
        adapter, base, merged = self.mixed(tmp_path, {"c_attn": "conv1d", "lm_head": "linear"})
        assert adapter.config["fan_in_fan_out"] is False
        oriented = adapter.orient({name: value.shape for name, value in base.items()})
        for name, value in applied(base, oriented).items():
            torch.testing.assert_close(value, merged[name], rtol=0, atol=2e-6)

    def test_square_among_two_kinds_is_refused(self, tmp_path: Path) -> None:
        adapter, base, _ = self.mixed(
            tmp_path, {"c_attn": "conv1d", "attn.c_proj": "conv1d", "lm_head": "linear"}
        )
        with pytest.raises(MismatchError, match=r"- transformer\.h\.0\.attn\.c_proj: is square"):
            adapter.orient({name: value.shape for name, value in base.items()})

    def test_square_ones_follow_the_others(self, tmp_path: Path) -> None:
        updates = write_adapter_folder(tmp_path, {"wide": (4, 6), "square": (5, 5)})
        oriented = open_adapter(tmp_path).orient({"wide.weight": (6, 4), "square.weight": (5, 5)})
        for target in oriented.targets.values():
            assert target.kind == "conv1d"
            torch.testing.assert_close(target.read().dense().double().mT, updates[target.name])
        unknown = open_adapter(tmp_path).orient({})
        assert {target.kind for target in unknown.targets.values()} == {"linear"}

    def test_all_mismatches_are_listed(self, tmp_path: Path) -> None:
        write_adapter_folder(tmp_path, {"a": (4, 6), "b": (4, 6), "c": (4, 6)})
        shapes = {"a.weight": (4, 7), "b.weight": (4, 6), "c.weight": (4,)}
        with pytest.raises(MismatchError) as caught:
            open_adapter(tmp_path).orient(shapes)
        assert "a.weight: the adapter changes a (4, 6) weight, the base model has (4, 7)" in str(caught.value)
        assert "c.weight" in str(caught.value)
        assert "b.weight" not in str(caught.value)


def edit(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Adds, replaces or (None) removes tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, Tensor | None] = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, {"format": "pt"})


A = "base_model.model.m.lora_A.weight"
B = "base_model.model.m.lora_B.weight"


class TestHostileAdapters:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_adapter_folder(tmp_path, {"m": (4, 6)}, rank=2)
        return tmp_path

    def configure(self, folder: Path, **changes: Any) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        write_json(folder / "adapter_config.json", config | changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"r": 3}, r"says rank 3, its factors are A \(2, 6\) and B \(4, 2\)"),
            ({"r": 0}, "rank must be a positive integer"),
            ({"r": 2.0}, "rank must be a positive integer"),
            ({"r": True}, "rank must be a positive integer"),
            ({"r": 10**400}, "says rank 1000"),
            ({"lora_alpha": "4"}, "lora_alpha must be a finite number"),
            ({"lora_alpha": 1e999}, "is not a JSON value|must be a finite number"),
            ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
            ({"rank_pattern": {"m": 5}}, "says rank 5"),
            ({"rank_pattern": {"(": 2}}, r"rank_pattern has the invalid pattern '\('"),
            ({"rank_pattern": ["m"]}, "rank_pattern must be an object"),
            ({"alpha_pattern": {"m": None}}, "lora_alpha must be a finite number, got None"),
            ({"use_rslora": "no"}, "use_rslora must be true or false"),
            ({"fan_in_fan_out": "no"}, "fan_in_fan_out must be true or false"),
            ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
            ({"peft_type": None}, "peft_type must be LORA"),
            ({"base_model_name_or_path": 3}, "must be a string"),
            ({"use_dora": True}, "uses DoRA"),
            ({"use_qalora": True}, "uses QALoRA"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "uses layer replication"),
            ({"trainable_token_indices": [1, 2]}, "uses trainable tokens"),
            ({"target_parameters": ["experts.up"]}, "fused experts"),
            ({"ensure_weight_tying": True}, "tied weights"),
            ({"lora_twist": 0.5}, "has the option lora_twist = 0.5, which dirmerge does not know"),
            ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
            ({"init_lora_weights": "loftq"}, "initialised by 'loftq'"),
            ({"init_lora_weights": "something_new"}, "initialised by 'something_new'"),
        ],
    )
    def test_configuration(self, folder: Path, changes: dict[str, Any], message: str) -> None:
        self.configure(folder, **changes)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_adapter(folder)
        assert str(folder) in str(caught.value)

    def test_unknown_options_that_are_off(self, folder: Path) -> None:
        self.configure(folder, lora_twist=None, lora_bend=False, lora_knots={}, lora_loops=[], use_dora=False)
        assert open_adapter(folder).targets["m"].rank == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({A: None}, "has only the factor B"),
            ({B: None}, "has only the factor A"),
            (
                {A: None, B: None, "other.lora_A.weight": torch.zeros(2, 6)},
                "must start with 'base_model.model.'",
            ),
            ({A: torch.zeros(2, 6).long()}, "factors must be floating-point"),
            ({A: torch.zeros(0)}, "without elements, as DeepSpeed ZeRO-3"),
            ({A: torch.zeros(2, 6, 1, 1)}, "LoRA on a convolution"),
            ({A: torch.zeros(3, 6)}, "says rank 2"),
            ({"base_model.model.m.lora_B.bias": torch.zeros(4)}, "lora_bias"),
            ({"base_model.model.m.lora_magnitude_vector": torch.zeros(4)}, "uses DoRA"),
            (
                {"base_model.model.m.lora_A.default.weight": torch.zeros(2, 6)},
                "kind that dirmerge does not know",
            ),
            ({"base_model.model.m.lora_diag": torch.zeros(2)}, "kind that dirmerge does not know"),
            (
                {"base_model.model.m.modules_to_save.weight": torch.zeros(2)},
                "kind that dirmerge does not know",
            ),
            (
                {"base_model.model.x.token_adapter.deltas": torch.zeros(2)},
                "kind that dirmerge does not know",
            ),
            ({"base_model.model.m.lora_embedding_A": torch.zeros(2, 6)}, "two kinds of factors"),
            (
                {"base_model.model.m.weight": torch.zeros(4, 6)},
                "both factors and a full tensor for 'm.weight'",
            ),
            (
                {"base_model.model.x.base_layer.weight": torch.zeros(2)},
                "base weight 'x.weight', but no factors",
            ),
            (
                {
                    "base_model.model.m.base_layer.bias": torch.zeros(4),
                    "base_model.model.m.bias": torch.zeros(4),
                },
                "appears twice",
            ),
        ],
    )
    def test_tensors(self, folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
        edit(folder, changes)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_adapter(folder)
        assert str(folder) in str(caught.value)

    def test_empty_adapter(self, folder: Path) -> None:
        edit(folder, {A: None, B: None})
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: holds no LoRA weight"):
            open_adapter(folder)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", [A, B])
    def test_not_finite(self, folder: Path, name: str, value: float) -> None:
        tensor = load_file(folder / "adapter_model.safetensors")[name]
        tensor[1, 1] = value
        edit(folder, {name: tensor})
        target = open_adapter(folder).targets["m"]
        with pytest.raises(
            NonFiniteError, match=r"adapter_model\.safetensors: tensor 'base_model\.model\.m\.lora_"
        ):
            target.read()

    def test_no_files(self, tmp_path: Path) -> None:
        assert not is_adapter(tmp_path)
        with pytest.raises(CheckpointError, match="not a PEFT adapter"):
            open_adapter(tmp_path)
        write_adapter_folder(tmp_path, {"m": (4, 6)})
        assert is_adapter(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
            open_adapter(tmp_path)
        torch.save({A: torch.zeros(2, 6)}, tmp_path / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="pickled weights only"):
            open_adapter(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{", '{"r": 1, "r": 2}', '{"lora_alpha": NaN}', "[" * 100_000])
    def test_malformed_configuration(self, folder: Path, content: str) -> None:
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            open_adapter(folder)


def updates_for(modules: list[AdapterModule]) -> dict[str, LowRank]:
    result = {}
    for module in modules:
        m, n = module.shape
        rank = module.rank
        result[module.name] = LowRank(
            torch.randn(m, rank), torch.randn(rank, rank) * 0.3, torch.randn(n, rank) * 0.3
        )
    return result


@torch.no_grad()
def assert_peft_agrees(
    build: Callable[[], nn.Module],
    folder: Path,
    updates: dict[str, LowRank],
    full: dict[str, Tensor] | None = None,
    atol: float = 1e-4,
) -> None:
    """PEFT's forward pass with the adapter must be that of base + dense updates, unlike the base's."""
    expected, plain = build(), build()
    state = expected.state_dict()
    for module, update in updates.items():
        state[f"{module}.weight"] += update.dense().to(state[f"{module}.weight"].dtype)
    for name, value in (full or {}).items():
        state[name].copy_(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(build(), folder).eval()
    ids = torch.arange(12).reshape(2, 6)
    truth, ours, base = (m(input_ids=ids).logits for m in (expected, model, plain))
    torch.testing.assert_close(ours, truth, rtol=0, atol=atol)
    assert (truth - base).abs().max() > 0.05


class TestWritingForPeft:
    def test_ranks_per_module(self, tmp_path: Path) -> None:
        # 12 layers: layers.1 is the end of layers.11's name for an unanchored pattern
        def build() -> nn.Module:
            return llama(12)

        ranks = {"model.layers.1.self_attn.q_proj": 5, "model.layers.11.self_attn.q_proj": 2}
        modules = [
            AdapterModule(
                f"model.layers.{i}.self_attn.q_proj",
                (16, 16),
                ranks.get(f"model.layers.{i}.self_attn.q_proj", 3),
            )
            for i in range(12)
        ]
        modules.append(AdapterModule("model.layers.1.mlp.up_proj", (24, 16), 7))
        updates = updates_for(modules)
        write_adapter(tmp_path, modules, updates.items(), base_name="tiny/llama")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 3
        assert config["base_model_name_or_path"] == "tiny/llama"
        assert_peft_agrees(build, tmp_path, updates)
        again = open_adapter(tmp_path)
        assert {name: target.rank for name, target in again.targets.items()} == {
            m.name: m.rank for m in modules
        }
        for name, target in again.targets.items():
            torch.testing.assert_close(target.read().dense(), updates[name].dense(), rtol=1e-5, atol=1e-6)

    def test_names_are_not_patterns(self, tmp_path: Path) -> None:
        # "a.b" as a regular expression also matches "axb"; as a suffix also "x.a.b"
        shapes = {"a.b": 1, "axb": 2, "x.a.b": 3, "x.a.bb": 4, "q": 2, "r": 2}
        modules = [AdapterModule(name, (6, 6), rank) for name, rank in shapes.items()]
        write_adapter(tmp_path, modules, updates_for(modules).items())
        config = LoraConfig.from_pretrained(str(tmp_path))
        for name, rank in shapes.items():
            key = peft.utils.other.get_pattern_key(config.rank_pattern.keys(), name)
            assert config.rank_pattern.get(key, config.r) == rank, name
            assert config.alpha_pattern.get(key, config.lora_alpha) == rank, name
        assert {name: target.rank for name, target in open_adapter(tmp_path).targets.items()} == shapes

    def test_conv1d_embedding_and_linear(self, tmp_path: Path) -> None:
        modules = [
            AdapterModule("transformer.h.0.attn.c_attn", (16, 48), 3, "conv1d"),
            AdapterModule("transformer.h.1.attn.c_proj", (16, 16), 2, "conv1d"),
            AdapterModule("transformer.wte", (40, 16), 4, "embedding"),
            AdapterModule("lm_head", (40, 16), 2, "linear"),
        ]
        updates = updates_for(modules)
        write_adapter(tmp_path, modules, updates.items())
        assert_peft_agrees(gpt2, tmp_path, updates)

    def test_full_tensors(self, tmp_path: Path) -> None:
        modules = [AdapterModule("bert.encoder.layer.0.attention.self.query", (16, 16), 2)]
        updates = updates_for(modules)
        full = {
            "classifier.weight": torch.randn(3, 16),
            "classifier.bias": torch.randn(3),
            "bert.encoder.layer.0.attention.self.query.bias": torch.randn(16),
            "bert.encoder.layer.1.output.dense.bias": torch.randn(16),
        }
        entries = [(name, value.dtype, value.shape) for name, value in full.items()]
        with AdapterWriter(tmp_path, modules, full=entries, task_type="SEQ_CLS") as writer:
            for name, value in full.items():
                writer.write_full(name, value[:1], start=0)
                writer.write_full(name, value[1:], start=1)
            writer.write(modules[0].name, updates[modules[0].name])
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier"]
        assert config["bias"] == "all"
        assert config["task_type"] == "SEQ_CLS"
        assert_peft_agrees(bert, tmp_path, updates, full)
        again = open_adapter(tmp_path)
        assert again.saved.keys() == full.keys()

    def test_head_task_without_its_head(self, tmp_path: Path) -> None:
        # PEFT would look for classifier.weight in the file
        modules = [AdapterModule("bert.encoder.layer.0.attention.self.query", (16, 16), 2)]
        updates = updates_for(modules)
        write_adapter(tmp_path, modules, updates.items(), task_type="SEQ_CLS")
        assert_peft_agrees(bert, tmp_path, updates)

    def test_smaller_update_is_padded(self, tmp_path: Path) -> None:
        modules = [AdapterModule("m", (5, 4), 3)]
        update = LowRank(torch.randn(5, 1), None, torch.randn(4, 1))
        write_adapter(tmp_path, modules, [("m", update)])
        read = open_adapter(tmp_path).targets["m"].read()
        assert read.rank == 3
        torch.testing.assert_close(read.dense(), update.dense())

    def test_dtype_and_overflow(self, tmp_path: Path) -> None:
        modules = [AdapterModule("m", (5, 4), 1)]
        update = LowRank(torch.randn(5, 1), None, torch.randn(4, 1))
        write_adapter(tmp_path / "a", modules, [("m", update)], dtype=torch.bfloat16)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert torch.equal(tensors[A], update.right.mT.bfloat16())
        assert torch.equal(tensors[B], update.left.bfloat16())
        with pytest.raises(
            NonFiniteError, match=r"'base_model\.model\.m\.lora_B\.weight' is not finite in torch\.float16"
        ):
            write_adapter(tmp_path / "b", modules, [("m", update.scaled(1e6))], dtype=torch.float16)
        assert not (tmp_path / "b" / "adapter_model.safetensors").exists()

    def test_refuses_what_was_not_planned(self, tmp_path: Path) -> None:
        modules = [AdapterModule("m", (5, 4), 2)]
        update = LowRank(torch.randn(5, 3), None, torch.randn(4, 3))
        with pytest.raises(ValueError, match=r"rank at most 2, got \(5, 4\) and 3"):
            write_adapter(tmp_path / "a", modules, [("m", update)])
        with pytest.raises(ValueError, match=r"must have shape \(5, 4\)"):
            write_adapter(tmp_path / "b", modules, [("m", update.T)])
        with pytest.raises(ValueError, match="'n' is not a planned module"):
            write_adapter(tmp_path / "c", modules, [("n", update)])
        with pytest.raises(ValueError, match="not written completely"):
            write_adapter(tmp_path / "d", modules, [])
        with pytest.raises(ValueError, match="names must be unique"):
            AdapterWriter(tmp_path / "e", modules * 2)
        with pytest.raises(ValueError, match="must not be empty"):
            AdapterWriter(tmp_path / "e", [])
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            AdapterWriter(tmp_path / "e", [AdapterModule("m", (5, 4), 0)])
        with pytest.raises(ValueError, match="has an update"):
            AdapterWriter(tmp_path / "e", modules, full=[("m.weight", torch.float32, (5, 4))])
        with pytest.raises(ValueError, match="belongs to no module"):
            AdapterWriter(tmp_path / "e", modules, full=[("scale", torch.float32, (1,))])
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "adapter_model.safetensors").write_text("mine")
        with pytest.raises(OutputError, match="File exists"):
            AdapterWriter(tmp_path / "f", modules)


def test_what_peft_reads_we_read(tmp_path: Path) -> None:
    # the shared builder of the other tests must itself be a valid adapter
    updates = write_adapter_folder(
        tmp_path, {f"model.{name}": shape for name, shape in list(MATRICES.items())[:2]}
    )
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert config.r == 2
    for target in open_adapter(tmp_path).targets.values():
        torch.testing.assert_close(target.read().dense().double(), updates[target.name], rtol=1e-6, atol=1e-8)
