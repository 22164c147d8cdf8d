from __future__ import annotations

import pytest
import torch

from dirmerge.ops.gram import gram

OP = "gram"


@pytest.mark.parametrize("shape", [(33, 70), (2, 199, 5), (1, 1), (3, 0, 4), (0, 5, 4), (2, 5, 0)], ids=str)
def test_is_the_product(dtype_of_backend: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype_of_backend)
    found = gram(x)
    truth = x.double().mT @ x.double()
    double = dtype_of_backend == torch.float64
    assert found.dtype == (torch.float64 if double else torch.float32)
    assert (found.double() - truth).norm() <= (1e-14 if double else 1e-6) * truth.norm()


def test_views_are_read_by_their_strides(dtype_of_backend: torch.dtype) -> None:
    x = torch.randn(4, 66, 40).to(dtype_of_backend)[::2, ::2].mT
    torch.testing.assert_close(gram(x), gram(x.contiguous()))


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="must have dtype"):
        gram(torch.ones(3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="must have shape"):
        gram(torch.ones(3))
