"""The Triton kernels, on CPU tensors in Triton's interpreter or compiled on a GPU; a process of its own:

TRITON_INTERPRET=1 python -m pytest tests/triton_kernels
python -m pytest tests/triton_kernels --gpu
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true", help="run the Triton kernels on a GPU; leave where none is"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads the variable when it is imported, and torch may have imported it before this file runs.
    if config.getoption("--gpu"):
        if INTERPRETED:
            raise pytest.UsageError("--gpu runs compiled kernels: leave TRITON_INTERPRET unset")
        if not torch.cuda.is_available():
            pytest.exit("No GPU that torch can use: the Triton kernels were not run on one.", returncode=0)
    elif not INTERPRETED:
        raise pytest.UsageError(
            "run these tests alone: TRITON_INTERPRET=1 python -m pytest tests/triton_kernels, or with --gpu"
        )


@pytest.fixture
def device(pytestconfig: pytest.Config) -> str:
    return "cuda" if pytestconfig.getoption("--gpu") else "cpu"


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    """Makes every tensor of a test on the device that the kernels run on."""
    if device == "cpu":
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


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
