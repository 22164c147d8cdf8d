"""Converting pickles: values kept, code never run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_state
from safetensors.torch import load_file

from dirmerge.checkpoints.convert import convert, main
from dirmerge.errors import CheckpointError, OutputError


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: {"state_dict": d, "epoch": 3}, lambda d: {"model": d}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_values_are_kept(tmp_path: Path, wrap: Any, zipped: bool) -> None:
    state = tiny_state(dtype=torch.bfloat16) | {"strided": torch.randn(3, 4).mT, "steps": torch.tensor(3)}
    state["tied"] = state["lm_head.weight"]
    torch.save(wrap(state), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    target = convert(tmp_path / "pytorch_model.bin")
    assert target == tmp_path / "model.safetensors"
    loaded = load_file(target)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model-00002-of-00003.bin", "model-00002-of-00003.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("weights.v2.pt", "weights.v2.safetensors"),
    ],
)
def test_names(tmp_path: Path, name: str, expected: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    assert convert(tmp_path / name).name == expected


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_code_never_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"a": torch.zeros(1), "b": Evil(trap)}, tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match=r"evil\.bin: cannot be loaded without running its code"):
        convert(tmp_path / "evil.bin")
    assert not trap.exists()
    # the trap works where a loader trusts the file
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize(
    "content", [{}, [torch.zeros(1)], {"a": 1.0}, {1: torch.zeros(1)}, {"a": {"b": torch.zeros(1)}}]
)
def test_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: must "):
        convert(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x02.", b"PK\x03\x04 not a zip"])
def test_garbage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        convert(tmp_path / "x.pt")


def test_never_overwrites_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.bin")
    assert main([str(tmp_path / "a.bin")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.safetensors'}\n"
    assert main([str(tmp_path / "a.bin")]) == OutputError.exit_code
    assert "File exists" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.bin")]) == CheckpointError.exit_code
    assert main([]) == 2
