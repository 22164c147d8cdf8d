from __future__ import annotations

import pytest
import torch

from dirmerge import ops

OP = "etf_project"


def truth(core: torch.Tensor) -> torch.Tensor:
    """The Gram operator formed as a matrix: K/(K − 1) (I − 11ᵀ/K)."""
    K = core.shape[-2]
    gram = (torch.eye(K, dtype=torch.float64) - 1 / K) * K / (K - 1)
    return gram @ core.double()


@pytest.mark.parametrize("shape", [(33, 70), (2, 199), (199, 1), (3, 70, 33), (2, 0, 4, 5), (5, 0)], ids=str)
def test_is_the_gram_operator(dtype_of_backend: torch.dtype, shape: tuple[int, ...]) -> None:
    core = torch.randn(shape).to(dtype_of_backend)
    found = ops.etf_project(core)
    expected = truth(core)
    assert found.dtype == dtype_of_backend
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}
    error = (found.double() - expected).norm()
    assert error <= unit[dtype_of_backend] * expected.norm()


def test_columns_sum_to_zero_and_a_constant_vanishes(dtype_of_backend: torch.dtype) -> None:
    core = torch.randn(64, 40).to(dtype_of_backend)
    sums = ops.etf_project(core).double().sum(0)
    assert sums.abs().max() <= 64 * 4 * torch.finfo(dtype_of_backend).eps
    assert not ops.etf_project(torch.full((64, 3), 2.5, dtype=dtype_of_backend)).any()


def test_twice_is_once_scaled() -> None:
    # G² = K/(K − 1) · G: a centring has only the eigenvalues 0 and K/(K − 1).
    core = torch.randn(17, 9, dtype=torch.float64)
    once = ops.etf_project(core)
    torch.testing.assert_close(ops.etf_project(once), once * 17 / 16, rtol=1e-13, atol=1e-14)


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    core = torch.randn(40, 66).to(dtype_of_backend)
    found = ops.etf_project(core.T[::2])
    error = (found.double() - truth(core.T[::2])).abs().max()
    assert error <= 8 * torch.finfo(dtype_of_backend).eps
    assert found.is_contiguous()


def test_the_input_is_left_alone(dtype_of_backend: torch.dtype) -> None:
    core = torch.randn(5, 6).to(dtype_of_backend)
    kept = core.clone()
    ops.etf_project(core)
    assert torch.equal(core, kept)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_scale(scale: float) -> None:
    core = torch.randn(33, 20) * scale
    torch.testing.assert_close(ops.etf_project(core).double(), truth(core), rtol=1e-5, atol=1e-6 * scale)


def test_nan_stays_in_its_column() -> None:
    core = torch.randn(5, 4)
    core[2, 1] = float("nan")
    assert ops.etf_project(core).isnan().any(0).tolist() == [False, True, False, False]


def test_arguments_that_do_not_fit_are_named() -> None:
    for shape in ((1, 5), (5,), (3, 0, 2)):
        with pytest.raises(ValueError, match="K >= 2"):
            ops.etf_project(torch.zeros(shape))
