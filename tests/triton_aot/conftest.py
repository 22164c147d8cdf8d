"""The Triton kernels, compiled ahead of time, in a process without TRITON_INTERPRET."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise pytest.UsageError("tests/triton_aot compiles: run it in a process without TRITON_INTERPRET")
