"""Records what a merge launches on a GPU, on a machine that has none.

The program is `dirmerge.merge` itself. It runs on the tests' shadow GPU (tests/shadow) without values:
tensors on the device have a shape and a dtype, and nothing is computed, so that a merge of eight
4096 × 4096 matrices is recorded in seconds. The files that it reads have the right size and hold zeros.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shapes import ADAPTER_RANK
from dirmerge import api

if TYPE_CHECKING:
    from shadow import Launch

TESTS = Path(__file__).parents[1] / "tests"
MODULE = "layers.0.attn.q_proj"
ITEMSIZE = 2  # of bfloat16, the dtype of all files


@dataclass(frozen=True)
class Log:
    """What one merge did on the device.

    Attributes:
        launches: in order.
        syncs: waits of the host for everything that was queued.
        bytes_in: copied to the device.
        bytes_out: copied to the host.
        peak_bytes: the most that was live on the device.
    """

    launches: list[Launch]
    syncs: int
    bytes_in: int
    bytes_out: int
    peak_bytes: int


def record(method: str, m: int, n: int, tasks: int, *, adapters: bool) -> Log:
    """Records the merge of one matrix into a full model, from files to files, with default options.

    Args:
        method: name of the method.
        m: rows of the matrix.
        n: columns.
        tasks: number of models or adapters, all in bfloat16.
        adapters: whether they are adapters of rank ADAPTER_RANK instead of full fine-tunes.
    """
    # The shadow GPU belongs to the tests, whose helpers are imported from their folder.
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from shadow import Shadow

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        weight = {f"{MODULE}.weight": (m, n)}
        _write_files(root / "base", "model", weight, {"model_type": "none", "torch_dtype": "bfloat16"})
        for t in range(tasks):
            if adapters:
                factors = {"lora_A": (ADAPTER_RANK, n), "lora_B": (m, ADAPTER_RANK)}
                tensors = {f"base_model.model.{MODULE}.{k}.weight": v for k, v in factors.items()}
                config = {"peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": ADAPTER_RANK}
                _write_files(root / f"{t}", "adapter_model", tensors, config)
            else:
                _write_files(root / f"{t}", "model", weight, {"torch_dtype": "bfloat16"})
        recipe = {
            "merge_method": method,
            "base_model": str(root / "base"),
            "models": [{"model": str(root / f"{t}")} for t in range(tasks)],
        }
        with Shadow(values=False) as gpu:
            api.merge(recipe, root / "out", device="cuda")
    return Log(gpu.launches, sum(gpu.syncs.values()), gpu.bytes_in, gpu.bytes_out, gpu.peak_bytes)


def _write_files(
    folder: Path, name: str, shapes: Mapping[str, tuple[int, int]], config: Mapping[str, object]
) -> None:
    """Writes a safetensors file of bfloat16 zeros, which take no space on a disk, and its configuration."""
    folder.mkdir()
    header, size = {}, 0
    for tensor, shape in shapes.items():
        start, size = size, size + ITEMSIZE * shape[0] * shape[1]
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / f"{name}.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    is_adapter = name == "adapter_model"
    settings = {**config, "target_modules": [MODULE.rpartition(".")[2]]} if is_adapter else config
    (folder / ("adapter_config.json" if is_adapter else "config.json")).write_text(json.dumps(settings))
