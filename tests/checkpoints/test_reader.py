"""Opening models: every layout, every refusal, and that reading never hands out what others own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_state, write_adapter_folder, write_json, write_model
from safetensors.torch import save_file
from torch import Tensor

from dirmerge.checkpoints.reader import open_checkpoint
from dirmerge.errors import CheckpointError


def assert_holds(source: Any, state: dict[str, Tensor]) -> None:
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        for name, value in state.items():
            info = checkpoint.tensors[name]
            assert (info.dtype, info.shape, info.nbytes) == (value.dtype, tuple(value.shape), value.nbytes)
            assert torch.equal(checkpoint.read(name), value)
            assert torch.equal(checkpoint.read(name, 1, 3), value[1:3])


class TestLayouts:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_folder(self, tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
        state = tiny_state(dtype=dtype)
        write_model(tmp_path, state, shards)
        assert_holds(tmp_path, state)
        assert_holds(str(tmp_path), state)
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.config == {"model_type": "tiny", "torch_dtype": str(dtype).removeprefix("torch.")}
        assert len(checkpoint.files) == shards
        assert checkpoint.source == str(tmp_path)
        assert checkpoint.path == tmp_path

    def test_single_file_and_index_file(self, tmp_path: Path) -> None:
        state = tiny_state()
        write_model(tmp_path / "one", state)
        write_model(tmp_path / "many", state, 2)
        assert_holds(tmp_path / "one" / "model.safetensors", state)
        assert_holds(tmp_path / "many" / "model.safetensors.index.json", state)
        (tmp_path / "one" / "model.safetensors").rename(tmp_path / "one" / "unet.safetensors")
        assert_holds(tmp_path / "one", state)

    def test_complete_shards_without_index(self, tmp_path: Path) -> None:
        state = tiny_state()
        write_model(tmp_path, state, 3)
        (tmp_path / "model.safetensors.index.json").unlink()
        assert_holds(tmp_path, state)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"misses model-00002-of-00003\.safetensors \(incomplete"):
            open_checkpoint(tmp_path)

    def test_cache_of_links(self, tmp_path: Path) -> None:
        # the hub's cache: snapshots hold links to blobs elsewhere
        state = tiny_state()
        write_model(tmp_path / "blobs", state, 2)
        snapshot = tmp_path / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for file in (tmp_path / "blobs").iterdir():
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
        assert_holds(snapshot, state)

    def test_adapter_beside_the_model_is_not_part_of_it(self, tmp_path: Path) -> None:
        state = tiny_state()
        write_model(tmp_path, state)
        write_adapter_folder(tmp_path)
        assert_holds(tmp_path, state)

    def test_other_formats_beside_safetensors_are_ignored(self, tmp_path: Path) -> None:
        state = tiny_state()
        write_model(tmp_path, state)
        for name in ("pytorch_model.bin", "model.fp16.safetensors", "consolidated.00.pth", "model-q4.gguf"):
            (tmp_path / name).write_bytes(b"x")
        assert_holds(tmp_path, state)

    def test_config_with_infinity(self, tmp_path: Path) -> None:
        write_model(tmp_path, tiny_state())
        (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
        assert open_checkpoint(tmp_path).config == {"time_step_limit": [0.0, float("inf")]}

    def test_no_config(self, tmp_path: Path) -> None:
        write_model(tmp_path, tiny_state())
        (tmp_path / "config.json").unlink()
        assert open_checkpoint(tmp_path).config is None


def set_map(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        write_json(path, index)

    return apply


def write_index(content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HOSTILE_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (
        set_map(lambda m: m.update({"norm.weight": "../../etc/passwd"})),
        r"got '\.\./\.\./etc/passwd'",
    ),
    "parent of a model": (
        set_map(lambda m: m.update(x="../other/model.safetensors")),
        "must lie in a file of this",
    ),
    "absolute": (
        set_map(lambda m: m.update(x="/etc/passwd.safetensors")),
        "must lie in a file of this folder",
    ),
    "backslash": (
        set_map(lambda m: m.update(x="..\\model.safetensors")),
        "must lie in a file of this folder",
    ),
    "drive": (set_map(lambda m: m.update(x="C:model.safetensors")), "must lie in a file of this folder"),
    "subfolder": (
        set_map(lambda m: m.update(x="sub/model.safetensors")),
        "must lie in a file of this folder",
    ),
    "nul": (set_map(lambda m: m.update(x="a\0.safetensors")), "must lie in a file of this folder"),
    "dots": (set_map(lambda m: m.update(x="..safetensors")), "must lie in a file of this folder"),
    "long": (set_map(lambda m: m.update(x="a" * 5000 + ".safetensors")), "must lie in a file of this folder"),
    "number": (set_map(lambda m: m.update(x=1)), "must lie in a file of this folder, got 1"),
    "list": (set_map(lambda m: m.update(x=[FIRST])), "must lie in a file of this folder"),
    "pickle": (set_map(lambda m: m.update(x="pytorch_model.bin")), "must lie in a file of this folder"),
    "missing shard": (
        set_map(lambda m: m.update(x="model-9.safetensors")),
        "shard model-9.safetensors, which does",
    ),
    "missing tensor": (
        set_map(lambda m: m.update(x=FIRST)),
        f"'x' is not in {FIRST}, where the index lists it",
    ),
    "unlisted tensor": (set_map(lambda m: m.pop("norm.weight") and None), "the index does not list it"),
    "wrong shard": (
        set_map(lambda m: m.update({"norm.weight": FIRST})),
        f"but the index lists it in {FIRST}",
    ),
    "empty map": (set_map(lambda m: m.clear()), "non-empty weight_map"),
    "no map": (write_index("{}"), "non-empty weight_map"),
    "map is a list": (write_index('{"weight_map": ["a"]}'), "non-empty weight_map"),
    "duplicate": (
        write_index(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}'),
        "the key 'a' occurs twice",
    ),
    "not json": (write_index("weights"), "malformed JSON"),
    "array": (write_index("[1]"), "must hold a JSON object"),
}


class TestHostileFolders:
    @pytest.mark.parametrize("case", HOSTILE_INDEX)
    def test_index(self, tmp_path: Path, case: str) -> None:
        change, message = HOSTILE_INDEX[case]
        write_model(tmp_path, tiny_state(), shards=2)
        change(tmp_path)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_same_tensor_in_two_shards(self, tmp_path: Path) -> None:
        state = tiny_state()
        write_model(tmp_path, state, 2)
        (tmp_path / "model.safetensors.index.json").unlink()
        save_file({"embed_tokens.weight": torch.zeros(2)}, tmp_path / SECOND)
        with pytest.raises(CheckpointError, match=r"'embed_tokens\.weight' is in .*00001.* and in .*00002"):
            open_checkpoint(tmp_path)

    def test_two_models_in_one_folder(self, tmp_path: Path) -> None:
        write_model(tmp_path, tiny_state(), 2)
        write_model(tmp_path, tiny_state(), 1)
        with pytest.raises(CheckpointError, match=r"both model\.safetensors and an index of other shards"):
            open_checkpoint(tmp_path)

    def test_ambiguous_files(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_file(tiny_state(), tmp_path / f"{name}.safetensors")
        with pytest.raises(
            CheckpointError, match=r"2 safetensors files .*a\.safetensors, b\.safetensors.*give the"
        ):
            open_checkpoint(tmp_path)

    def test_one_shard_is_not_a_model(self, tmp_path: Path) -> None:
        write_model(tmp_path, tiny_state(), 2)
        with pytest.raises(CheckpointError, match="is one of 2 shards; give the folder"):
            open_checkpoint(tmp_path / FIRST)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no safetensors file"):
            open_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="no such file or folder"):
            open_checkpoint(tmp_path / "missing")
        save_file({}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="holds no tensor"):
            open_checkpoint(tmp_path)
        (tmp_path / "model.txt").write_text("x")
        with pytest.raises(CheckpointError, match=r"must be a folder or a \.safetensors file"):
            open_checkpoint(tmp_path / "model.txt")

    def test_adapter_is_not_a_model(self, tmp_path: Path) -> None:
        write_adapter_folder(tmp_path)
        with pytest.raises(CheckpointError, match="is a PEFT adapter, not a model"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{", '{"a": 1, "a": 2}', "\x00"])
    def test_malformed_config(self, tmp_path: Path, content: str) -> None:
        write_model(tmp_path, tiny_state())
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(tmp_path)


class TestPickles:
    def test_the_command_in_the_message_works(self, tmp_path: Path) -> None:
        folder = tmp_path / "it's a model"
        folder.mkdir()
        state = tiny_state(dtype=torch.bfloat16)
        names = list(state)
        state["tied.weight"] = state[names[0]]
        half = len(names) // 2
        torch.save({name: state[name] for name in names[:half]}, folder / "pytorch_model-00001-of-00002.bin")
        rest = {name: state[name] for name in [*names[half:], "tied.weight"]}
        torch.save({"state_dict": rest}, folder / "pytorch_model-00002-of-00002.bin")
        torch.save({"lr": 1}, folder / "training_args.bin")
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        message = str(caught.value)
        assert "can run code when loaded" in message
        assert "training_args" not in message
        command = shlex.split(message.splitlines()[1])
        assert command[:3] == ["python", "-m", "dirmerge.checkpoints.convert"]
        subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
        assert_holds(folder, state)

    @pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
    def test_single_file(self, tmp_path: Path, name: str) -> None:
        torch.save({"a": torch.zeros(2)}, tmp_path / name)
        with pytest.raises(CheckpointError, match="pickled weights only"):
            open_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError, match="pickled weights only"):
            open_checkpoint(tmp_path)


class TestQuantised:
    @pytest.mark.parametrize(
        ("config", "extra", "message"),
        [
            (
                {"quantization_config": {"quant_method": "gptq", "bits": 4}},
                {"m.qweight": torch.zeros(2, 2).int()},
                r"quantised \(quant_method 'gptq'\): tensor 'm.qweight' is int32.*dequantize",
            ),
            ({}, {"m.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, "'m.weight' is float8_e4m3fn"),
            ({}, {"m.weight": torch.zeros(2, 2).to(torch.int8)}, "'m.weight' is int8"),
            ({}, {"m.weight_scale_inv": torch.zeros(2)}, "'m.weight_scale_inv'"),
            ({}, {"m.weight.absmax": torch.zeros(2)}, "absmax"),
            ({}, {"m.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}, "bitsandbytes__nf4"),
            ({}, {"experts.gate_up_proj_blocks": torch.zeros(2, 2).byte()}, "gate_up_proj_blocks"),
            ({"quantization_config": {"quant_method": "fp8"}}, {}, "'fp8'.*remove quantization_config"),
            ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, {}, "'awq'"),
        ],
    )
    def test_refused(
        self, tmp_path: Path, config: dict[str, Any], extra: dict[str, Tensor], message: str
    ) -> None:
        write_model(tmp_path, tiny_state() | extra, config=config)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)

    def test_integer_buffers_are_not_quantised(self, tmp_path: Path) -> None:
        state = tiny_state() | {
            "h.0.attn.bias": torch.ones(1, 1, 4, 4).byte(),
            "embeddings.position_ids": torch.arange(4)[None],
            "mask": torch.ones(4).bool(),
            "attn.logit_scales": torch.ones(2, 2),
        }
        write_model(tmp_path, state, config={"quantization_config": None})
        assert open_checkpoint(tmp_path).tensors.keys() == state.keys()

    def test_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
        for source in (tmp_path, tmp_path / "model-q4.gguf"):
            with pytest.raises(CheckpointError, match="GGUF files are"):
                open_checkpoint(source)


class TestStateDict:
    def test_values_and_rows(self) -> None:
        state = tiny_state() | {"strided": torch.randn(4, 6).mT}
        assert_holds(state, state)
        checkpoint = open_checkpoint(state)
        assert checkpoint.path is None
        assert checkpoint.files == []
        assert all(info.file is None for info in checkpoint.tensors.values())
        assert checkpoint.read("strided").is_contiguous()

    def test_reading_never_aliases(self) -> None:
        state = {"a": torch.zeros(4, 2), "p": torch.nn.Parameter(torch.zeros(3))}
        checkpoint = open_checkpoint(state)
        checkpoint.read("a").add_(1)
        checkpoint.read("a", 1, 3).add_(1)
        checkpoint.read("p").add_(1)
        assert not state["a"].any()
        assert not state["p"].any()
        assert not checkpoint.read("p").requires_grad

    def test_tied_names(self) -> None:
        weight = torch.randn(4, 2)
        state = {
            "embed": weight,
            "other": weight.clone(),
            "head": weight,
            "part": weight[:2],
            "none": torch.empty(0),
        }
        assert open_checkpoint(state).tied == [("embed", "head")]

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "holds no tensor"),
            ({"a": 1}, "must map names to tensors"),
            ({1: torch.zeros(1)}, "must map names to tensors"),
            ({"a": {"b": torch.zeros(1)}}, "must map names to tensors, got str 'a': dict"),
            ({"a": torch.zeros(1, device="meta")}, "dense and in memory"),
            ({"a": torch.zeros(2, 2).to_sparse()}, "dense and in memory"),
            ({"a": torch.zeros(2, 2).to(torch.float8_e5m2)}, "is quantised"),
        ],
    )
    def test_refused(self, state: Any, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(state)

    def test_unknown_name_rows_of_a_scalar_and_closed(self) -> None:
        checkpoint = open_checkpoint({"a": torch.zeros(3), "s": torch.tensor(1.0)})
        with pytest.raises(CheckpointError, match="state dict has no tensor 'b'"):
            checkpoint.read("b")
        with pytest.raises(ValueError, match="'s' is a scalar"):
            checkpoint.read("s", 0, 1)
        with pytest.raises(ValueError, match="0 <= start <= stop <= 3"):
            checkpoint.read("a", 2, 5)
        checkpoint.close()
        with pytest.raises(ValueError, match="is closed"):
            checkpoint.read("a")


class TestTiedByConfig:
    @pytest.mark.parametrize(
        "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}]
    )
    def test_both_stored(self, tmp_path: Path, config: dict[str, Any]) -> None:
        write_model(tmp_path, tiny_state(), config=config)
        assert open_checkpoint(tmp_path).tied == [("embed_tokens.weight", "lm_head.weight")]

    @pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": "yes"}])
    def test_not_tied(self, tmp_path: Path, config: dict[str, Any]) -> None:
        write_model(tmp_path, tiny_state(), config=config)
        assert open_checkpoint(tmp_path).tied == []

    def test_only_one_stored(self, tmp_path: Path) -> None:
        state = tiny_state()
        del state["lm_head.weight"]
        write_model(tmp_path, state, config={"tie_word_embeddings": True})
        assert open_checkpoint(tmp_path).tied == []
