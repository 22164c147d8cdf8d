"""The format itself: both directions against the safetensors library, hostile files, bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import safetensors_bytes as pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dirmerge.checkpoints.safetensors_reader import DTYPES, TensorInfo, read_header, read_tensor
from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter
from dirmerge.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit pattern of the dtype, NaN payloads and denormals included."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    numel = torch.Size(shape).numel()
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()),
    )


def all_kinds() -> dict[str, torch.Tensor]:
    state = {f"t.{name}": random_bits((3, 5), dtype) for name, dtype in DTYPES.items()}
    state |= {"scalar": torch.tensor(1.5, dtype=torch.bfloat16), "flag": torch.tensor(True)}
    state |= {
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "empty.1": torch.empty(3, 0),
        "ünï 名": torch.ones(7),
    }
    return state


class TestAgainstTheLibrary:
    def test_reads_what_the_library_writes(self, tmp_path: Path) -> None:
        state = all_kinds()
        save_file(state, tmp_path / "x.safetensors", {"format": "pt", "note": "é"})
        header, metadata = read_header(tmp_path / "x.safetensors")
        assert metadata == {"format": "pt", "note": "é"}
        assert header.keys() == state.keys()
        for name, tensor in state.items():
            assert bits(read_tensor(header[name])) == bits(tensor)

    def test_library_reads_what_we_write(self, tmp_path: Path) -> None:
        state = all_kinds()
        path = tmp_path / "x.safetensors"
        with SafetensorsFileWriter(
            path, [(name, t.dtype, t.shape) for name, t in state.items()], {"format": "pt"}
        ) as writer:
            for name in reversed(state):
                writer.write(name, state[name])
        loaded = load_file(path)
        assert loaded.keys() == state.keys()
        for name, tensor in state.items():
            assert bits(loaded[name]) == bits(tensor)
        assert read_header(path)[1] == {"format": "pt"}

    def test_tensors_are_aligned(self, tmp_path: Path) -> None:
        # An odd number of bytes before a wider dtype would leave it misaligned: mapping readers fail then.
        path = tmp_path / "x.safetensors"
        with SafetensorsFileWriter(path, [("b", torch.bool, (3,)), ("d", torch.float64, (2,))]) as writer:
            writer.write("b", torch.tensor([True, False, True]))
            writer.write("d", torch.tensor([1.0, 2.0], dtype=torch.float64))
        header, _ = read_header(path)
        assert all(info.offset % info.dtype.itemsize == 0 for info in header.values())
        assert load_file(path)["d"].tolist() == [1.0, 2.0]

    def test_strided_and_chunked_writing(self, tmp_path: Path) -> None:
        whole = torch.randn(10, 4)
        path = tmp_path / "x.safetensors"
        with SafetensorsFileWriter(
            path, [("a", torch.float32, (10, 4)), ("t", torch.float32, (4, 10))]
        ) as writer:
            writer.write("a", whole[:3], start=0)
            writer.write("t", whole.mT)
            writer.write("a", whole[3:3], start=3)
            writer.write("a", whole[3:], start=3)
        loaded = load_file(path)
        assert torch.equal(loaded["a"], whole)
        assert torch.equal(loaded["t"], whole.mT)

    def test_rows(self, tmp_path: Path) -> None:
        state = {"m": torch.randn(6, 3, 2).bfloat16(), "before": torch.randn(5)}
        save_file(state, tmp_path / "x.safetensors")
        info = read_header(tmp_path / "x.safetensors")[0]["m"]
        for start, stop in [(0, 6), (0, 1), (2, 5), (5, 6), (3, 3)]:
            assert torch.equal(read_tensor(info, start, stop), state["m"][start:stop])
        assert torch.equal(read_tensor(info, 4), state["m"][4:])
        assert torch.equal(read_tensor(info, stop=2), state["m"][:2])

    def test_reading_gives_fresh_memory(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(4)}, tmp_path / "x.safetensors")
        info = read_header(tmp_path / "x.safetensors")[0]["a"]
        read_tensor(info).add_(1)
        assert read_tensor(info).tolist() == [0, 0, 0, 0]


HOSTILE = {
    "empty file": (b"", "cannot hold a header"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "cannot hold a header"),
    "length beyond the file": (pack({"a": ENTRY}, bytes(24), length=10_000), "truncated"),
    "length just below the limit": (pack({"a": ENTRY}, bytes(24), length=99_999_999), "truncated"),
    "absurd length": (pack({"a": ENTRY}, bytes(24), length=2**63), "claims a header of"),
    "length over the limit": (pack({}, length=100_000_001), "the limit is 100000000"),
    "not json": (pack(b"{not json}"), "malformed JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "malformed JSON"),
    "array": (pack(b"[]"), "not a JSON object"),
    "leading space": (pack(b" {}"), "not a JSON object"),
    "pickle": (b"\x80\x02}q\x00." + bytes(50), "claims a header of"),
    "deep nesting": (pack(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "digits without end": (pack(b'{"a":' + b"9" * 10_000 + b"}"), "malformed JSON"),
    "nan": (pack(b'{"a": NaN}'), "NaN is not a JSON value"),
    "duplicate tensor": (
        pack(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'.encode(), bytes(24)),
        "'a' occurs twice",
    ),
    "duplicate field": (
        pack(b'{"a": {"dtype": "F32", "dtype": "I8", "shape": [], "data_offsets": [0, 4]}}', bytes(4)),
        "'dtype' occurs twice",
    ),
    "entry is a list": (pack({"a": []}), "tensor 'a' must have exactly"),
    "missing field": (pack({"a": {"dtype": "F32", "shape": []}}), "tensor 'a' must have exactly"),
    "extra field": (pack({"a": ENTRY | {"scale": 2}}, bytes(24)), "tensor 'a' must have exactly"),
    "unknown dtype": (pack({"a": ENTRY | {"dtype": "F31"}}, bytes(24)), "dtype 'F31'"),
    "dtype is a list": (pack({"a": ENTRY | {"dtype": ["F32"]}}, bytes(24)), "not supported"),
    "sub-byte dtype": (pack({"a": ENTRY | {"dtype": "F4"}}, bytes(24)), "dtype 'F4'"),
    "negative size": (pack({"a": ENTRY | {"shape": [-2, -3]}}, bytes(24)), "non-negative"),
    "float size": (pack({"a": ENTRY | {"shape": [2.0, 3]}}, bytes(24)), "non-negative"),
    "boolean size": (pack({"a": ENTRY | {"shape": [True, 6]}}, bytes(24)), "non-negative"),
    "shape is a number": (pack({"a": ENTRY | {"shape": 6}}, bytes(24)), "must have a shape"),
    "overflow": (pack({"a": ENTRY | {"shape": [2**62, 8]}}, bytes(24)), "no memory can hold"),
    "overflow to the right size": (
        pack({"a": {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
        "no memory can hold",
    ),
    "overflow times zero": (
        pack({"a": {"dtype": "F32", "shape": [0, 2**62, 8], "data_offsets": [0, 0]}}),
        "no memory can hold",
    ),
    "huge size": (pack({"a": ENTRY | {"shape": [2**70]}}, bytes(24)), "64-bit"),
    "many dimensions": (pack({"a": ENTRY | {"shape": [1] * 1000}}, bytes(24)), "at most 64"),
    "size does not fit shape": (pack({"a": ENTRY | {"shape": [2, 4]}}, bytes(24)), "needs 32 bytes, has 24"),
    "more bytes than shape": (
        pack({"a": ENTRY | {"data_offsets": [0, 28]}}, bytes(28)),
        "needs 24 bytes, has 28",
    ),
    "offsets reversed": (pack({"a": ENTRY | {"data_offsets": [24, 0]}}, bytes(24)), "claims the bytes 24:0"),
    "offsets beyond the file": (pack({"a": ENTRY}, bytes(23)), "claims the bytes 0:24 of 23"),
    "negative offset": (
        pack({"a": ENTRY | {"data_offsets": [-24, 0]}}, bytes(24)),
        "non-negative data_offsets",
    ),
    "three offsets": (pack({"a": ENTRY | {"data_offsets": [0, 24, 24]}}, bytes(24)), "two non-negative"),
    "overlap": (pack({"a": ENTRY, "b": ENTRY}, bytes(24)), "'b' overlaps 'a'"),
    "partial overlap": (
        pack({"a": ENTRY, "b": ENTRY | {"data_offsets": [20, 44]}}, bytes(44)),
        "'b' overlaps 'a'",
    ),
    "gap": (
        pack({"a": ENTRY, "b": ENTRY | {"data_offsets": [28, 52]}}, bytes(52)),
        "'b' leaves a gap after 'a'",
    ),
    "gap at the start": (pack({"a": ENTRY | {"data_offsets": [4, 28]}}, bytes(28)), "gap after 'the header'"),
    "trailing bytes": (pack({"a": ENTRY}, bytes(25)), "1 bytes after the last tensor"),
    "metadata is a list": (pack({"__metadata__": []}), "must map strings to strings"),
    "metadata holds a number": (pack({"__metadata__": {"a": 1}}), "must map strings to strings"),
    "surrogate name": (pack(b'{"\\ud800": ' + json.dumps(ENTRY).encode() + b"}", bytes(24)), "valid Unicode"),
}


class TestHostileFiles:
    @pytest.mark.parametrize("case", HOSTILE)
    def test_refused_with_file_and_reason(self, tmp_path: Path, case: str) -> None:
        data, message = HOSTILE[case]
        path = tmp_path / "evil.safetensors"
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert "evil.safetensors" in str(caught.value)
        assert message in str(caught.value)

    def test_no_memory_for_lies(self, tmp_path: Path) -> None:
        # 64 MiB of address space beyond what is mapped: any allocation that believes a number above fails.
        path = tmp_path / "evil.safetensors"
        lies = [data for data, _ in HOSTILE.values()]
        script = (
            "import resource, sys\n"
            "from pathlib import Path\n"
            "from dirmerge.checkpoints.safetensors_reader import read_header\n"
            "from dirmerge.errors import CheckpointError\n"
            "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), resource.RLIM_INFINITY))\n"
            "for path in sys.argv[1:]:\n"
            "    try:\n"
            "        read_header(path)\n"
            "    except CheckpointError:\n"
            "        continue\n"
            "    sys.exit(path)\n"
        )
        paths = []
        for number, data in enumerate(lies):
            path = tmp_path / f"{number}.safetensors"
            path.write_bytes(data)
            paths.append(str(path))
        done = subprocess.run(
            [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("keep", [0, 4, 8, 20, 100, -25, -1])
    def test_truncated_anywhere(self, tmp_path: Path, keep: int) -> None:
        save_file({"a": torch.randn(2, 3), "b": torch.randn(4)}, tmp_path / "x.safetensors")
        data = (tmp_path / "x.safetensors").read_bytes()
        (tmp_path / "x.safetensors").write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            read_header(tmp_path / "x.safetensors")

    def test_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path, message in [
            (tmp_path / "missing", "No such file"),
            (tmp_path, "not a regular file"),
            (tmp_path / "pipe", "not a regular file"),
            (tmp_path / ("n" * 300), "File name too long"),
        ]:
            with pytest.raises(CheckpointError, match=message):
                read_header(path)

    def test_file_changed_after_the_header(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.randn(2, 3)}, path)
        info = read_header(path)[0]["a"]
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: was changed .*'a'"):
            read_tensor(info)
        path.unlink()
        with pytest.raises(CheckpointError, match="cannot be opened"):
            read_tensor(info)

    def test_rewritten_in_place(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.zeros(6)}, path)
        info = read_header(path)[0]["a"]
        save_file({"a": torch.ones(6)}, path)
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointError, match="was changed"):
            read_tensor(info)

    def test_short_read_is_noticed_without_stamp(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(bytes(10))
        info = TensorInfo("a", torch.float32, (4,), tmp_path / "x", 0, 16)
        with pytest.raises(CheckpointError, match="'a' is truncated: 6 of 16 bytes are missing"):
            read_tensor(info)

    def test_bytes_that_are_no_booleans(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes(pack({"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"))
        with pytest.raises(CheckpointError, match="no booleans"):
            read_tensor(read_header(path)[0]["a"])

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_mutations_read_or_are_refused(self, tmp_path: Path, data: st.DataObject) -> None:
        path = tmp_path / "x.safetensors"
        if not path.exists():
            save_file({"a": torch.randn(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.tensor(True)}, path)
        original = path.read_bytes()
        mutated = bytearray(original)
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, min(len(mutated) - 1, 250)))
            action = data.draw(st.sampled_from(["flip", "digit", "drop", "insert"]))
            if action == "flip":
                mutated[position] = data.draw(st.integers(0, 255))
            elif action == "digit":
                mutated[position] = data.draw(st.sampled_from(b'0123456789-.eE[]{}",:'))
            elif action == "drop":
                del mutated[position]
            else:
                mutated.insert(position, data.draw(st.sampled_from(b"0123456789 [],")))
        copy = tmp_path / "y.safetensors"
        copy.write_bytes(mutated)
        try:
            header, _ = read_header(copy)
            tensors = [read_tensor(info) for info in header.values()]
        except CheckpointError:
            return
        assert sum(tensor.nbytes for tensor in tensors) < len(mutated)


class TestReading:
    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (3, 2), (7, None)])
    def test_rows_out_of_range(self, tmp_path: Path, start: int, stop: int | None) -> None:
        save_file({"a": torch.zeros(6)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="rows must satisfy 0 <= start <= stop <= 6 for 'a'"):
            read_tensor(read_header(tmp_path / "x.safetensors")[0]["a"], start, stop)

    def test_scalar_has_no_rows(self, tmp_path: Path) -> None:
        save_file({"a": torch.tensor(1.0)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="'a' is a scalar"):
            read_tensor(read_header(tmp_path / "x.safetensors")[0]["a"], 0, 1)

    def test_resident_memory_is_what_is_held(self, tmp_path: Path) -> None:
        # A mapped file of 192 MB would count as resident once read; rows of it must not.
        path = tmp_path / "x.safetensors"
        rows = 3 << 14
        with SafetensorsFileWriter(path, [("a", torch.float32, (rows, 1024))]) as writer:
            block = torch.ones(1 << 14, 1024)
            for start in range(0, rows, 1 << 14):
                writer.write("a", block, start)
        del block
        script = (
            "import resource, sys\n"
            "from dirmerge.checkpoints.safetensors_reader import read_header, read_tensor\n"
            "info = read_header(sys.argv[1])[0]['a']\n"
            "read_tensor(info, 0, 64)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "total = sum(float(read_tensor(info, i, i + 1024).sum()) for i in range(0, info.shape[0], "
            "1024))\n"
            "assert total == info.numel, total\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
        )
        kilobytes = int(done.stdout)
        assert kilobytes < 48 << 10, f"reading 4 MB at a time of 192 MB took {kilobytes} kB"
