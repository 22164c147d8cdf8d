"""Side files: what is copied beside the weights, and what never is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import tiny_state, write_json, write_model

from dirmerge.checkpoints.side_files import copy_side_files
from dirmerge.errors import OutputError


class TestSideFiles:
    def test_what_is_copied(self, tmp_path: Path) -> None:
        source, out = tmp_path / "source", tmp_path / "out"
        out.mkdir()
        write_model(source, tiny_state(), shards=2)
        wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        wanted |= {
            "tokenizer.model",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
        }
        wanted |= {"merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json"}
        wanted |= {"video_preprocessor_config.json", "processor_config.json", "modeling_tiny.py", "LICENSE"}
        wanted |= {"LICENSE.txt", "NOTICE", "qwen.tiktoken"}
        unwanted = {"pytorch_model.bin", "training_args.bin", "optimizer.pt", "README.md", "tokenizer.pkl"}
        unwanted |= {"adapter_config.json", "vocab.pt", "trainer_state.json", "model.gguf"}
        unwanted |= {"pytorch_model.bin.index.json"}
        for name in wanted | unwanted:
            if not (source / name).exists():
                (source / name).write_text(f'{{"{name}": 1}}')
        (source / "tokenizer_files").mkdir()
        copied = copy_side_files(source, out)
        assert set(copied) == wanted
        assert {path.name for path in out.iterdir()} == wanted
        assert all((out / name).read_bytes() == (source / name).read_bytes() for name in wanted)

    def test_links_are_followed_and_pipes_are_not_read(self, tmp_path: Path) -> None:
        source, out = tmp_path / "source", tmp_path / "out"
        source.mkdir()
        out.mkdir()
        (tmp_path / "blob").write_text("{}")
        (source / "config.json").symlink_to("../blob")
        (source / "vocab.json").symlink_to("../missing")
        os.mkfifo(source / "tokenizer.json")
        assert copy_side_files(source, out) == ["config.json"]
        assert not (out / "config.json").is_symlink()
        assert (out / "config.json").read_text() == "{}"

    def test_dtype_is_restated(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        config = {
            "torch_dtype": "float32",
            "text_config": {"dtype": "float32", "hidden_size": 4},
            "vision_config": {"hidden_size": 4},
            "limit": float("inf"),
            "name": "dtype",
        }
        write_model(source, tiny_state(), config=config)
        for number, (dtype, expected) in enumerate(
            [(torch.bfloat16, "bfloat16"), (torch.float32, "float32"), (None, "float32")]
        ):
            out = tmp_path / str(number)
            out.mkdir()
            copy_side_files(source, out, dtype)
            new = json.loads((out / "config.json").read_text())
            assert new["torch_dtype"] == expected
            assert new["text_config"] == {"dtype": expected, "hidden_size": 4}
            assert new["vision_config"] == {"hidden_size": 4}
            assert {k: v for k, v in new.items() if "config" not in k and "dtype" not in k} == {
                "limit": float("inf"),
                "name": "dtype",
            }
            assert list(new) == list(config)
            same = (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
            assert same == (dtype != torch.bfloat16)

    def test_no_dtype_is_invented(self, tmp_path: Path) -> None:
        write_model(tmp_path / "source", tiny_state(), config={"hidden_size": 4})
        (tmp_path / "out").mkdir()
        copy_side_files(tmp_path / "source", tmp_path / "out", torch.bfloat16)
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"hidden_size": 4}

    def test_never_overwrites(self, tmp_path: Path) -> None:
        write_model(tmp_path / "source", tiny_state())
        (tmp_path / "out").mkdir()
        write_json(tmp_path / "out" / "config.json", {"mine": 1})
        with pytest.raises(OutputError, match="File exists"):
            copy_side_files(tmp_path / "source", tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"mine": 1}
