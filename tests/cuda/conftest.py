"""The CUDA C++ kernels on CPU tensors, emulated, under several thread orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from emulation import CSRC, ORDERS, Emulated, compile_emulated

from dirmerge.backends import cuda


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The emulated library, compiled once a session."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    return Emulated(compile_emulated(CSRC, sources, tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def emulated(emulated_library: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """dirmerge.backends.cuda runs on the emulated library."""
    monkeypatch.setattr(cuda, "library", lambda: emulated_library.library)
    yield emulated_library
    emulated_library.configure(0)


@pytest.fixture(params=[*ORDERS, "two blocks"])
def each_order(request: pytest.FixtureRequest, emulated: Emulated) -> None:
    """Runs the test under every order of the threads, and with two blocks that stride over the work."""
    if request.param == "two blocks":
        emulated.configure(1, max_blocks=2)
    else:
        emulated.configure(request.param)


@pytest.fixture
def as_good_as_torch() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Asserts that an error against float64 is at most twice torch's own in the same dtype."""

    def check(found: torch.Tensor, by_torch: torch.Tensor, truth: torch.Tensor) -> None:
        assert found.dtype == by_torch.dtype
        assert found.shape == by_torch.shape
        assert found.is_contiguous()
        error = (found.double() - truth).norm()
        assert error <= 2 * (by_torch.double() - truth).norm(), (error, (by_torch.double() - truth).norm())

    return check
