"""Fixtures of every test: poisoned memory, seeds, one backend after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

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


@pytest.fixture(params=["torch", "native"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under each backend; native is skipped, with the reason, where it is not built."""
    name: str = request.param
    info = backends.native_build_info()
    if name == "native" and isinstance(info, str):
        pytest.skip(info)
    with backends.backend(name):
        yield name
