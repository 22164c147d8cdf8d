"""The output folder's all-or-nothing promise, sharded writing, side files, the spool."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny_state, write_json, write_model
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file

from dirmerge.checkpoints.reader import open_checkpoint
from dirmerge.checkpoints.spool import Spool
from dirmerge.checkpoints.writer import (
    OutputFolder,
    ShardedWriter,
    copy_side_files,
    plan_shards,
)
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import OutputError


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below a folder: names, contents, modes, times, link targets."""
    result: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        result[str(path.relative_to(folder))] = (content, status.st_mode, status.st_mtime_ns, status.st_ino)
    return result


def existing(out: Path) -> Path:
    (out / "sub").mkdir(parents=True)
    (out / "model.safetensors").write_bytes(b"old weights")
    (out / "sub" / "notes.txt").write_text("mine")
    (out / "dirmerge.json").write_text('{"dirmerge": "0.1.0"}')
    return out


def write_new(out: Path, overwrite: bool = False) -> None:
    with OutputFolder(out, overwrite) as folder:
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "new.txt").write_text("new")
        folder.commit()


class TestOutputFolder:
    @pytest.mark.parametrize("before", ["missing", "empty", "missing parents"])
    def test_commit(self, tmp_path: Path, before: str) -> None:
        out = tmp_path / "a" / "b" / "out" if before == "missing parents" else tmp_path / "out"
        if before == "empty":
            out.mkdir()
        with OutputFolder(out) as folder:
            (folder.path / "x").write_text("1")
            assert folder.path.parent == out.parent
            assert re.fullmatch(rf"\.out\.dirmerge-staging-{os.getpid()}-[0-9a-f]{{8}}", folder.path.name)
            assert not out.exists() or not any(out.iterdir())
            folder.commit()
        assert [path.name for path in out.iterdir()] == ["x"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        umask = os.umask(0)
        os.umask(umask)
        assert out.stat().st_mode & 0o777 == 0o777 & ~umask

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_exception_leaves_nothing(self, tmp_path: Path, error: type[BaseException]) -> None:
        def fail() -> None:
            with OutputFolder(tmp_path / "a" / "b" / "out") as folder:
                (folder.path / "x").write_text("1")
                raise error

        with pytest.raises(error):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_exception_keeps_parents_that_were_there(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with OutputFolder(tmp_path / "a" / "b" / "out"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert list((tmp_path / "a").iterdir()) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_exception_leaves_the_existing_folder_as_it_is(self, tmp_path: Path, overwrite: bool) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(tmp_path)

        def fail() -> None:
            with OutputFolder(out, overwrite) as folder:
                (folder.path / "model.safetensors").write_bytes(b"new")
                raise RuntimeError

        with pytest.raises(RuntimeError if overwrite else OutputError):
            fail()
        assert snapshot(tmp_path) == before

    def test_existing_folder_is_refused_before_any_work(self, tmp_path: Path) -> None:
        existing(tmp_path / "out")
        with pytest.raises(OutputError, match="exists and is not empty"):
            OutputFolder(tmp_path / "out")

    def test_folder_filled_meanwhile(self, tmp_path: Path) -> None:
        with OutputFolder(tmp_path / "out") as folder:
            existing(tmp_path / "out")
            before = snapshot(tmp_path / "out")
            with pytest.raises(OutputError, match="exists and is not empty"):
                folder.commit()
        assert snapshot(tmp_path / "out") == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_overwrite(self, tmp_path: Path) -> None:
        existing(tmp_path / "out")
        write_new(tmp_path / "out", overwrite=True)
        assert {path.name for path in (tmp_path / "out").rglob("*")} == {"sub", "new.txt"}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_link_stays_a_link(self, tmp_path: Path) -> None:
        existing(tmp_path / "disk" / "models")
        (tmp_path / "out").symlink_to("disk/models")
        write_new(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out").is_symlink()
        assert {path.name for path in (tmp_path / "disk" / "models").iterdir()} == {"sub"}

    def test_rename_fails_between(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if "staging" in self.name:
                raise OSError(28, "No space left on device")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OutputError, match=r"out: cannot be put in place: No space left"):
            write_new(out, overwrite=True)
        monkeypatch.undo()
        assert snapshot(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("manifest", [None, "", "[]", '{"other": 1}', "folder", "link to nothing"])
    def test_a_folder_of_others_is_not_replaced(self, tmp_path: Path, manifest: str | None) -> None:
        out = existing(tmp_path / "out")
        (out / "dirmerge.json").unlink()
        if manifest == "folder":
            (out / "dirmerge.json").mkdir()
        elif manifest == "link to nothing":
            (out / "dirmerge.json").symlink_to("nothing")
        elif manifest is not None:
            (out / "dirmerge.json").write_text(manifest)
        before = snapshot(tmp_path)
        with pytest.raises(OutputError, match="was not written by dirmerge"):
            write_new(out, overwrite=True)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize(
        ("place", "relation"),
        [
            ("out", "holds"),
            ("out/sub", "holds"),
            ("out/model.safetensors", "holds"),
            ("link", "holds"),
            ("links", "holds"),
            (".", "lies in"),
            ("link/../link", "holds"),
        ],
    )
    def test_protected_places_are_not_replaced(self, tmp_path: Path, place: str, relation: str) -> None:
        out = existing(tmp_path / "out")
        (tmp_path / "link").symlink_to("out")
        (tmp_path / "links").symlink_to("out/sub/notes.txt")
        before = snapshot(tmp_path)
        for spelling in (out, tmp_path / "link"):
            with pytest.raises(OutputError, match=f"{relation} the input"):
                OutputFolder(spelling, True, [tmp_path / "elsewhere", tmp_path / place])
        assert snapshot(tmp_path) == before

    def test_a_link_inside_is_protected_as_well_as_its_target(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        (tmp_path / "weights").write_text("elsewhere")
        (out / "weights").symlink_to(tmp_path / "weights")
        with pytest.raises(OutputError, match="holds the input"):
            OutputFolder(out, True, [out / "weights"])

    @pytest.mark.parametrize("inside", [".", "sub"])
    def test_the_working_directory_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
    ) -> None:
        out = existing(tmp_path / "out")
        monkeypatch.chdir(out / inside)
        with pytest.raises(OutputError, match="holds the working directory"):
            OutputFolder(out, True)
        monkeypatch.chdir(tmp_path)
        write_new(out, overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_file_in_the_way(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="out: is a file"):
            OutputFolder(tmp_path / "out", overwrite)
        with (
            pytest.raises(OutputError, match="cannot be written: Not a directory"),
            OutputFolder(tmp_path / "out/x"),
        ):
            pass
        assert (tmp_path / "out").read_text() == "mine"

    def test_path_only_while_open(self, tmp_path: Path) -> None:
        folder = OutputFolder(tmp_path / "out")
        with pytest.raises(ValueError, match="open only inside"):
            folder.path  # noqa: B018
        with folder:
            folder.commit()
            with pytest.raises(ValueError, match="open only inside"):
                folder.commit()


KILLED = """
import os, signal, sys
from pathlib import Path
from dirmerge.checkpoints import writer
mode, out = sys.argv[1:]
rename, rmtree = Path.rename, writer.shutil.rmtree
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "between":
    Path.rename = lambda self, target: die() if "staging" in self.name else rename(self, target)
if mode == "removing":
    writer.shutil.rmtree = die
with writer.OutputFolder(out, overwrite=True) as folder:
    (folder.path / "new.txt").write_text("new")
    if mode == "writing":
        die()
    if mode == "alive":
        print("ready", flush=True)
        sys.stdin.read()
    folder.commit()
"""


class TestKilled:
    def kill(self, mode: str, out: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, mode, str(out)], capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr

    def test_while_writing(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        self.kill("writing", out)
        assert snapshot(out) == before
        (left,) = [path.name for path in tmp_path.iterdir() if path.name != "out"]
        assert re.fullmatch(r"\.out\.dirmerge-staging-\d+-[0-9a-f]{8}", left)
        # what only looks similar stays: another output's, a file, a link, another tool's
        others = [
            ".other.dirmerge-staging-1-00000000",
            ".out.dirmerge-staging-1-0000000",
            "out.dirmerge-staging-1-00000000",
        ]
        for name in others:
            (tmp_path / name).mkdir()
            (tmp_path / name / ".dirmerge-lock").touch()
        (tmp_path / ".out.dirmerge-staging-1-00000001").write_text("a file")
        (tmp_path / ".out.dirmerge-staging-1-00000002").symlink_to(out)
        write_new(out, overwrite=True)
        names = {path.name for path in tmp_path.iterdir()}
        assert left not in names
        assert names == {
            "out", *others, ".out.dirmerge-staging-1-00000001", ".out.dirmerge-staging-1-00000002"
        }  # fmt: skip

    def test_between_the_renames(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        self.kill("between", out)
        assert not out.exists()
        with OutputFolder(out, overwrite=True):
            assert snapshot(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_between_the_renames_without_overwrite(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        before = snapshot(out)
        self.kill("between", out)
        with pytest.raises(OutputError, match="exists and is not empty"), OutputFolder(out):
            pass
        assert snapshot(out) == before

    def test_while_removing_the_old_one(self, tmp_path: Path) -> None:
        out = existing(tmp_path / "out")
        self.kill("removing", out)
        assert [path.name for path in out.iterdir()] == ["new.txt"]
        # the half-removed one must never come back, even if the new one is gone
        (out / "new.txt").unlink()
        out.rmdir()
        write_new(out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["sub"]

    def test_before_the_lock(self, tmp_path: Path) -> None:
        (tmp_path / ".out.dirmerge-staging-1-00000000").mkdir()
        write_new(tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_link_is_never_restored(self, tmp_path: Path) -> None:
        existing(tmp_path / "other")
        link = tmp_path / ".out.dirmerge-replaced-1-00000000"
        link.symlink_to("other")
        write_new(tmp_path / "out")
        assert link.is_symlink()
        assert not (tmp_path / "out").is_symlink()

    def test_living_process_is_left_alone(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, "alive", str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            (theirs,) = list(tmp_path.iterdir())
            before = snapshot(theirs)
            with OutputFolder(out) as folder:
                (folder.path / "dirmerge.json").write_text('{"dirmerge": "0.1.0"}')
                folder.commit()
            assert snapshot(theirs) == before
            process.stdin.close()
            assert process.wait() == 0
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
        # they may overwrite, so theirs is there now, and nothing else
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["new.txt"]


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


class TestSpool:
    def test_gives_back_what_was_put(self, tmp_path: Path) -> None:
        values: dict[str, Any] = {
            "dense": torch.randn(5, 3),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "strided": torch.randn(4, 6).mT,
            "empty": torch.empty(0, 3),
            "factored": LowRank(torch.randn(5, 2), torch.randn(2, 2), torch.randn(4, 2)),
            "no core": LowRank(torch.randn(5, 2), None, torch.randn(4, 2)),
        }
        with Spool(tmp_path) as spool:
            for name, value in values.items():
                assert name not in spool
                spool.put(name, value)
            for name in reversed(values):
                value, got = values[name], spool.get(name)
                assert name in spool
                if isinstance(value, LowRank):
                    assert isinstance(got, LowRank)
                    assert torch.equal(got.left, value.left)
                    assert torch.equal(got.right, value.right)
                    assert (got.core is None) == (value.core is None)
                    assert value.core is None or torch.equal(got.core, value.core)
                else:
                    assert isinstance(got, torch.Tensor)
                    assert got.dtype == value.dtype
                    assert torch.equal(got, value)
            # what is handed out is the caller's
            got = spool.get("dense")
            assert isinstance(got, torch.Tensor)
            got.zero_()
            assert torch.equal(spool.get("dense"), values["dense"])  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="'dense' is in the spool"):
                spool.put("dense", values["dense"])
            with pytest.raises(KeyError):
                spool.get("missing")
        assert list(tmp_path.iterdir()) == []

    def test_leaves_no_name_behind(self, tmp_path: Path) -> None:
        # so that nothing remains of a killed process, and nothing of it is committed
        spool = Spool(tmp_path)
        spool.put("a", torch.zeros(100))
        assert list(tmp_path.iterdir()) == []
        spool.close()

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="missing: cannot hold temporary files"):
            Spool(tmp_path / "missing")


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
