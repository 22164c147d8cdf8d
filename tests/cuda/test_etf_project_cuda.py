from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dirmerge import backends, ops
from dirmerge.backends import cuda

# One tile of rows, more than one, and the last row of each form.
SHAPES = [(33, 70), (199, 33), (2, 1), (3, 128, 5), (2, 129, 1)]


def truth(core: torch.Tensor) -> torch.Tensor:
    K = core.shape[-2]
    return (core.double() - core.double().mean(-2, keepdim=True)) * (K / (K - 1))


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_gram_operator(shape: tuple[int, ...], as_good_as_torch: Callable[..., None]) -> None:
    for dtype in backends.FLOATING:
        core = torch.randn(shape, dtype=torch.float64).to(dtype)
        found = cuda.etf_project(core)
        if dtype == torch.float64:
            torch.testing.assert_close(found, truth(core), rtol=1e-13, atol=1e-14)
        else:
            as_good_as_torch(found, ops.etf_project(core), truth(core))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("K", [100, 4000])
def test_a_mean_far_from_zero_costs_no_more_than_in_torch(
    K: int, as_good_as_torch: Callable[..., None]
) -> None:
    core = torch.randn(K, 40) + 1000
    as_good_as_torch(cuda.etf_project(core), ops.etf_project(core), truth(core))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("K", [64, 300])
def test_a_constant_vanishes_and_what_is_not_finite_stays_in_its_column(K: int) -> None:
    for dtype in backends.FLOATING:
        core = torch.full((K, 40), 2.5, dtype=dtype)
        assert not cuda.etf_project(core).any()
        core[7, 3], core[9, 35], core[11, 39] = float("nan"), float("inf"), -float("inf")
        torch.testing.assert_close(cuda.etf_project(core), ops.etf_project(core), equal_nan=True)


@pytest.mark.usefixtures("each_order")
def test_views_are_read_by_their_strides(as_good_as_torch: Callable[..., None]) -> None:
    base = torch.randn(2, 3, 140, 66)
    for core in (base.mT, base[:, :, ::3, 5:], base.transpose(0, 1)[..., ::2], base[0, 0].expand(2, 140, 66)):
        kept = core.clone()
        as_good_as_torch(cuda.etf_project(core), ops.etf_project(core), truth(core))
        assert torch.equal(core, kept)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_scale(scale: float) -> None:
    core = torch.randn(33, 20) * scale
    torch.testing.assert_close(cuda.etf_project(core).double(), truth(core), rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.usefixtures("emulated")
def test_what_is_empty_stays_empty() -> None:
    for shape in ((0, 3, 4), (2, 3, 0), (0, 2, 0)):
        assert cuda.etf_project(torch.empty(shape)).shape == shape
