from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.gram import gram

from dirmerge.ops.gram import gram as gram_op


@pytest.mark.parametrize("shape", [(33, 70), (2, 100, 33), (1, 1), (40, 150)], ids=str)
def test_is_the_product(
    shape: tuple[int, ...], dtype: torch.dtype, as_good_as_torch: Callable[..., None]
) -> None:
    x = torch.randn(shape).to(dtype)
    found = gram(x)
    as_good_as_torch(found, gram_op(x), x.double().mT @ x.double())
    assert torch.equal(found, found.mT)


def test_aligned_rows_take_the_large_tiles(as_good_as_torch: Callable[..., None]) -> None:
    x = torch.randn(2, 80, 144).bfloat16()
    as_good_as_torch(gram(x), gram_op(x), x.double().mT @ x.double())


def test_views_and_empty_batches(as_good_as_torch: Callable[..., None]) -> None:
    x = torch.randn(4, 66, 40)[::2, ::2].mT
    as_good_as_torch(gram(x), gram_op(x), x.double().mT @ x.double())
    assert gram(torch.empty(0, 4, 5)).shape == (0, 5, 5)
    assert gram(torch.empty(3, 5, 0)).shape == (3, 0, 0)
    assert torch.equal(gram(torch.empty(2, 0, 3)), torch.zeros(2, 3, 3))
