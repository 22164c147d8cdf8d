"""The Triton kernels, compiled ahead of time, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise pytest.UsageError("tests/triton_aot compiles: run it in a process without TRITON_INTERPRET")

if importlib.util.find_spec("dirmerge.triton_kernels") is None:
    # An installation maps the package; in a plain checkout it is the folder at the top.
    folder = Path(__file__).parents[2] / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        "dirmerge.triton_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
