from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.etf_project import etf_project

from dirmerge import ops


@pytest.mark.parametrize("shape", [(33, 70), (2, 150, 33), (3, 2, 1), (2, 128, 5), (1, 129, 3)], ids=str)
def test_is_the_gram_operator(
    shape: tuple[int, ...], dtype: torch.dtype, as_good_as_torch: Callable[..., None]
) -> None:
    core = (torch.randn(shape) + 3).to(dtype)
    K = shape[-2]
    truth = K / (K - 1) * (core.double() - core.double().mean(-2, keepdim=True))
    as_good_as_torch(etf_project(core), ops.etf_project(core), truth)


def test_float64_keeps_its_accuracy() -> None:
    core = torch.randn(2, 33, 70, dtype=torch.float64)
    truth = 33 / 32 * (core - core.mean(-2, keepdim=True))
    torch.testing.assert_close(etf_project(core), truth, rtol=1e-13, atol=1e-14)


def test_views_and_empty_batches() -> None:
    core = torch.randn(70, 66)
    torch.testing.assert_close(etf_project(core.T[::2]), ops.etf_project(core.T[::2]))
    for shape in ((0, 4, 5), (2, 4, 0)):
        assert etf_project(torch.empty(shape)).shape == shape
