"""Fixtures of every test: poisoned memory, seeds, one implementation of an op after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import dirmerge.ops  # noqa: F401  fills the backend table
from dirmerge import backends

# Makes torch fill `empty` with NaN: a kernel that leaves an entry unwritten cannot pass by luck.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _skip_if_missing(name: str) -> None:
    info = backends.native_build_info()
    if name == "native" and isinstance(info, str):
        pytest.skip(info)


@pytest.fixture(params=["torch", "native"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under each backend; native is skipped, with the reason, where it is not built."""
    _skip_if_missing(request.param)
    with backends.backend(request.param):
        yield request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `dtype_of_backend` runs for every backend × dtype that its module's OP has."""
    if "dtype_of_backend" in metafunc.fixturenames:
        pairs = [
            (name, dtype)
            for name, found in backends.implementations(metafunc.module.OP, "cpu").items()
            # Triton's have tests of their own, which need an interpreter or a GPU.
            if name != "triton"
            for dtype in backends.FLOATING
            if found.dtypes is None or dtype in found.dtypes
        ]
        ids = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in pairs]
        metafunc.parametrize("dtype_of_backend", pairs, ids=ids, indirect=True)


@pytest.fixture
def dtype_of_backend(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype to test, with its backend forced."""
    name, dtype = request.param
    _skip_if_missing(name)
    with backends.backend(name):
        yield dtype
