"""The Triton kernels on CPU tensors in Triton's interpreter, in a process of its own:

TRITON_INTERPRET=1 python -m pytest tests/triton_kernels
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

# Triton reads the variable when it is imported, and torch may have imported it before this file runs.
if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run these tests alone: TRITON_INTERPRET=1 python -m pytest tests/triton_kernels")


@pytest.fixture
def as_good_as_torch() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Asserts that an error against float64 is at most twice torch's own in the same dtype."""

    def check(found: torch.Tensor, by_torch: torch.Tensor, truth: torch.Tensor) -> None:
        assert found.dtype == by_torch.dtype
        assert found.shape == by_torch.shape
        error = (found.double() - truth).norm()
        # Where torch happens to be exact, a rounding of a few entries is no fault.
        floor = torch.finfo(torch.float32).eps / 8 * truth.norm()
        assert error <= 2 * (by_torch.double() - truth).norm() + floor

    return check


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found
