"""Turns pickled weights into safetensors: `python -m dirmerge.checkpoints.convert FILE...`.

Only PyTorch's weights_only loader is used, which builds tensors and plain containers and runs no code of the
file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dirmerge.checkpoints.safetensors_writer import SafetensorsFileWriter
from dirmerge.errors import CheckpointError, DirmergeError


def convert(path: str | Path) -> Path:
    """Writes the tensors of a pickled state dict beside it, under the name that model loaders expect.

    Args:
        path: a file of torch.save with a mapping of names to tensors, also under the key "state_dict" or
            "model".

    Returns:
        The new file: pytorch_model-00001-of-00002.bin becomes model-00001-of-00002.safetensors.

    Raises:
        CheckpointError: if it cannot be loaded safely, or holds something else.
        OutputError: if the new file exists or cannot be written.
    """
    path = Path(path)
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes raise anything: KeyError, IndexError, struct.error …
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be loaded without running its code: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path}: must hold a mapping of names to tensors, got {type(content).__name__}"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: must map names to tensors, got {name!r}: {type(value).__name__}")
    target = path.with_name(path.stem.replace("pytorch_model", "model") + ".safetensors")
    entries = [(name, value.dtype, value.shape) for name, value in content.items()]
    with SafetensorsFileWriter(target, entries, {"format": "pt"}) as writer:
        for name, value in content.items():
            writer.write(name, value)
    return target


def main(files: list[str]) -> int:
    """Converts each file and names the result; returns the exit code."""
    if not files:
        sys.stderr.write("usage: python -m dirmerge.checkpoints.convert FILE...\n")
        return 2
    for file in files:
        try:
            sys.stdout.write(f"{convert(file)}\n")
        except DirmergeError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
