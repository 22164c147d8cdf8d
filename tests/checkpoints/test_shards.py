"""Sharded weights: in any order, from any thread, as the libraries of models read them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers import tiny_state
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file

from dirmerge.checkpoints.output import OutputFolder
from dirmerge.checkpoints.reader import open_checkpoint
from dirmerge.checkpoints.shards import ShardedWriter, plan_shards
from dirmerge.checkpoints.side_files import copy_side_files
from dirmerge.errors import OutputError


class TestShardedWriter:
    @pytest.mark.parametrize("shard_size", [1, 1000, 3000, 10**9])
    def test_reads_back(self, tmp_path: Path, shard_size: int) -> None:
        state = tiny_state() | {"flag": torch.tensor(True), "half": torch.randn(3, 3).bfloat16()}
        entries = [(name, value.dtype, value.shape) for name, value in state.items()]
        with ShardedWriter(tmp_path, entries, shard_size) as writer:
            for name, value in state.items():
                if value.ndim == 2:
                    writer.write(name, value[:1], start=0)
                    writer.write(name, value[1:], start=1)
                else:
                    writer.write(name, value)
        loaded = {name: value for file in writer.files for name, value in load_file(file).items()}
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
        checkpoint = open_checkpoint(tmp_path)
        assert all(torch.equal(checkpoint.read(name), value) for name, value in state.items())
        assert writer.total_size == sum(value.nbytes for value in state.values())
        for file in writer.files:
            sizes = [value.nbytes for value in load_file(file).values()]
            assert len(sizes) == 1 or sum(sizes) <= shard_size
        if shard_size >= max(value.nbytes for value in state.values()):
            # the same files as the hub's own library would make
            split = split_torch_state_dict_into_shards(
                state, max_shard_size=shard_size, filename_pattern="model{suffix}.safetensors"
            )
            assert {file.name: sorted(load_file(file)) for file in writer.files} == {
                name: sorted(names) for name, names in split.filename_to_tensors.items()
            }
        index_path = tmp_path / "model.safetensors.index.json"
        assert index_path.exists() == (len(writer.files) > 1)
        if index_path.exists():
            index = json.loads(index_path.read_text())
            assert index["weight_map"] == {
                name: file.name for file in writer.files for name in load_file(file)
            }
            assert index["metadata"]["total_size"] == writer.total_size

    def test_one_file_open_at_a_time(self, tmp_path: Path) -> None:
        entries = [(f"t{i}", torch.float32, (4,)) for i in range(50)]
        before = len(os.listdir("/proc/self/fd"))
        with ShardedWriter(tmp_path, entries, 16) as writer:
            for name, dtype, shape in entries:
                writer.write(name, torch.zeros(shape, dtype=dtype))
                assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert len(writer.files) == 50

    def test_any_order(self, tmp_path: Path) -> None:
        state = tiny_state()
        with ShardedWriter(tmp_path, [(k, v.dtype, v.shape) for k, v in state.items()], 1500) as writer:
            for name in reversed(state):
                writer.write(name, state[name])
        checkpoint = open_checkpoint(tmp_path)
        assert all(torch.equal(checkpoint.read(name), value) for name, value in state.items())

    @pytest.mark.parametrize(("written", "shard_size"), [([], 100), (["a"], 100), (["a"], 1), (["b"], 1)])
    def test_incomplete(self, tmp_path: Path, written: list[str], shard_size: int) -> None:
        writer = ShardedWriter(tmp_path, [("a", torch.float32, (2,)), ("b", torch.float32, (2,))], shard_size)
        for name in written:
            writer.write(name, torch.zeros(2))
        with pytest.raises(ValueError, match="not written"):
            writer.close()
        assert not (tmp_path / "model.safetensors.index.json").exists()
        assert not (tmp_path / "model.safetensors").exists()

    def test_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = ("a", torch.float32, (2,))
        with pytest.raises(ValueError, match="entries must not be empty"):
            ShardedWriter(tmp_path, [])
        with pytest.raises(ValueError, match="'a' twice"):
            ShardedWriter(tmp_path, [entry, entry], 1)
        with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
            ShardedWriter(tmp_path, [entry], 0)
        with ShardedWriter(tmp_path, [entry]) as writer:
            with pytest.raises(ValueError, match="'b' is not a planned tensor"):
                writer.write("b", torch.zeros(2))
            writer.write("a", torch.zeros(2))
            with pytest.raises(ValueError, match="'a' was written before"):
                writer.write("a", torch.zeros(2))
        usage = type("Usage", (), {"free": 7})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(OutputError, match="needs 8 bytes, only 7 are free"):
            ShardedWriter(tmp_path, [entry])

    def test_plan_keeps_order_and_counts_empty_tensors(self) -> None:
        entries = [
            ("a", torch.float32, (2,)),
            ("b", torch.float32, (0,)),
            ("c", torch.bfloat16, ()),
            ("d", torch.int8, (9,)),
        ]
        shards, total = plan_shards(entries, 10)
        assert [[name for name, _, _ in shard] for shard in shards] == [["a", "b", "c"], ["d"]]
        assert total == 8 + 0 + 2 + 9


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert len(checkpoint.files) > 2
    with OutputFolder(tmp_path / "out") as folder:
        copy_side_files(tmp_path / "model", folder.path, torch.bfloat16)
        entries = [(info.name, torch.bfloat16, info.shape) for info in checkpoint.tensors.values()]
        with ShardedWriter(folder.path, entries, 3000) as writer:
            for name in checkpoint.tensors:
                writer.write(name, checkpoint.read(name).bfloat16())
        folder.commit()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in model.state_dict().items())
