"""Writing safetensors files: only what was planned, once, and nothing half."""

from __future__ import annotations

import json
import random
import resource
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter
from dirmerge.errors import OutputError


class TestWriter:
    def entries(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [("a", torch.float32, (4, 3)), ("b", torch.bfloat16, ())]

    def test_refuses_what_was_not_planned(self, tmp_path: Path) -> None:
        writer = SafetensorsFileWriter(tmp_path / "x", self.entries())
        with pytest.raises(ValueError, match="'c' is not a planned tensor"):
            writer.write("c", torch.zeros(1))
        with pytest.raises(ValueError, match=r"'a' must be torch\.float32 as planned, got torch\.float64"):
            writer.write("a", torch.zeros(4, 3, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"must have shape \(4, 3\)"):
            writer.write("a", torch.zeros(3, 4))
        with pytest.raises(ValueError, match="rows of 'a' must have shape"):
            writer.write("a", torch.zeros(2, 4), start=0)
        with pytest.raises(ValueError, match="rows of 'b' must have shape"):
            writer.write("b", torch.zeros((), dtype=torch.bfloat16), start=0)
        with pytest.raises(ValueError, match="0 <= start <= stop <= 4"):
            writer.write("a", torch.zeros(5, 3), start=0)
        writer.write("a", torch.zeros(2, 3), start=2)
        for rows, start in ((2, 2), (2, 1), (1, 3), (4, 0)):
            with pytest.raises(ValueError, match="rows of 'a' were written before"):
                writer.write("a", torch.zeros(rows, 3), start=start)
        with pytest.raises(ValueError, match="rows of 'a' were written before"):
            writer.write("a", torch.zeros(4, 3))
        writer.write("a", torch.zeros(2, 3), start=0)
        with pytest.raises(ValueError, match="'a' was written before"):
            writer.write("a", torch.zeros(4, 3))
        assert not writer.complete
        with pytest.raises(ValueError, match=r"1 tensors were not written completely, e\.g\. 'b'"):
            writer.close()
        assert not (tmp_path / "x").exists()

    def test_rows_in_any_order_from_several_threads(self, tmp_path: Path) -> None:
        values = {name: torch.randn(40, 3) for name in "abc"}
        parts = [(name, start) for name in values for start in range(0, 40, 4)]
        random.Random(0).shuffle(parts)
        with SafetensorsFileWriter(
            tmp_path / "x", [(name, value.dtype, value.shape) for name, value in values.items()]
        ) as writer:
            with ThreadPoolExecutor(4) as pool:
                done = pool.map(lambda p: writer.write(p[0], values[p[0]][p[1] : p[1] + 4], p[1]), parts)
            assert list(done) == [None] * len(parts)
            assert writer.complete
        found = load_file(tmp_path / "x")
        assert all(torch.equal(found[name], value) for name, value in values.items())

    def test_half_a_tensor_is_not_complete(self, tmp_path: Path) -> None:
        writer = SafetensorsFileWriter(tmp_path / "x", [("a", torch.float32, (4, 3))])
        writer.write("a", torch.zeros(3, 3), start=0)
        with pytest.raises(ValueError, match=r"not written completely, e\.g\. 'a'"):
            writer.close()

    def test_exception_removes_the_file(self, tmp_path: Path) -> None:
        def fail() -> None:
            with SafetensorsFileWriter(tmp_path / "x", self.entries()) as writer:
                writer.write("a", torch.zeros(4, 3))
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_never_overwrites(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("mine")
        with pytest.raises(OutputError, match="File exists"):
            SafetensorsFileWriter(tmp_path / "x", self.entries())
        assert (tmp_path / "x").read_text() == "mine"

    def test_bad_plans(self, tmp_path: Path) -> None:
        twice = [("a", torch.float32, (1,))] * 2
        with pytest.raises(ValueError, match="'a' again"):
            SafetensorsFileWriter(tmp_path / "x", twice)
        with pytest.raises(ValueError, match="unique and not __metadata__"):
            SafetensorsFileWriter(tmp_path / "x", [("__metadata__", torch.float32, (1,))])
        with pytest.raises(ValueError, match=r"cannot store torch\.complex128"):
            SafetensorsFileWriter(tmp_path / "x", [("a", torch.complex128, (1,))])

    def test_full_disk(self, tmp_path: Path) -> None:
        # a file-size limit fails like a full disk, in the middle of a write
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        script = (
            "import resource, signal, sys, torch\n"
            "from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter\n"
            "from dirmerge.errors import OutputError\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {hard}))\n"
            "try:\n"
            "    with SafetensorsFileWriter(sys.argv[1], [('a', torch.float32, (65536,))]) as writer:\n"
            "        writer.write('a', torch.zeros(65536))\n"
            "except OutputError as error:\n"
            "    print(error)\n"
        )
        assert soft != 65536
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "x")], capture_output=True, text=True, check=True
        )
        assert "x: tensor 'a' cannot be written: File too large" in done.stdout
        assert not (tmp_path / "x").exists()


def test_header_length_field_is_little_endian(tmp_path: Path) -> None:
    with SafetensorsFileWriter(tmp_path / "x", [("a", torch.uint8, (1,))]) as writer:
        writer.write("a", torch.tensor([7], dtype=torch.uint8))
    data = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length]) == {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    assert data[8 + length :] == b"\7"
