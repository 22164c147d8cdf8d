from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.lowrank_add import lowrank_add

from dirmerge import ops


@pytest.mark.parametrize("m_n_k", [(33, 70, 9), (70, 33, 100), (130, 1, 3), (48, 160, 16)], ids=str)
@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_sum(
    m_n_k: tuple[int, int, int],
    factor: torch.dtype,
    dtype: torch.dtype,
    as_good_as_torch: Callable[..., None],
) -> None:
    m, n, k = m_n_k
    base, left, right = (
        torch.randn(m, n).to(dtype),
        torch.randn(m, k).to(factor),
        torch.randn(n, k).to(factor),
    )
    truth = base.double() + 0.3 * left.double() @ right.double().T
    found = lowrank_add(base, left, right, scale=0.3)
    as_good_as_torch(found, ops.lowrank_add(base, left, right, scale=0.3), truth)


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_sum_is_rounded_once_to_nearest_even(out: torch.dtype) -> None:
    # 1 + i/2¹² around the ties of bfloat16 (2⁻⁸) and of float16 (2⁻¹¹), all exact in float32.
    steps = torch.arange(64.0)[:, None] / 4096
    base, left, right = torch.ones(64, 3), steps, torch.tensor([[1.0], [-1.0], [4.0]])
    exact = 1 + steps.double() * right.double().T
    assert torch.equal(lowrank_add(base, left, right, out_dtype=out), exact.to(out))


def test_views_empty_factors_and_mixed_dtypes(as_good_as_torch: Callable[..., None]) -> None:
    base, left, right = torch.randn(70, 33).T.half(), torch.randn(9, 33).T, torch.randn(140, 9)[::2].double()
    truth = base.double() + left.double() @ right.T
    as_good_as_torch(lowrank_add(base, left, right), ops.lowrank_add(base, left, right), truth)
    assert torch.equal(lowrank_add(base, torch.empty(33, 0), torch.empty(70, 0)), base)
    assert lowrank_add(torch.empty(0, 3), torch.empty(0, 2), torch.empty(3, 2)).shape == (0, 3)
