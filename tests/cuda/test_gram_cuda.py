from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dirmerge import ops
from dirmerge.backends import cuda

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.usefixtures("each_order")
@pytest.mark.parametrize("shape", [(33, 70), (2, 70, 33), (1, 5), (5, 1), (17, 199)], ids=str)
def test_is_the_product(shape: tuple[int, ...], as_good_as_torch: Callable[..., None]) -> None:
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype)
        found = cuda.gram(x)
        as_good_as_torch(found, ops.gram(x), x.double().mT @ x.double())
        assert torch.equal(found, found.mT)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_many_rows_and_any_scale(scale: float, as_good_as_torch: Callable[..., None]) -> None:
    x = torch.randn(4099, 40) * scale
    as_good_as_torch(cuda.gram(x), ops.gram(x), x.double().mT @ x.double())


@pytest.mark.usefixtures("each_order")
def test_views_are_read_by_their_strides(as_good_as_torch: Callable[..., None]) -> None:
    base = torch.randn(3, 2, 80, 66)
    for x in (base.mT, base[:, :, ::3, 5:], base.transpose(0, 1)[..., ::2], base[0, 0].expand(2, 80, 66)):
        as_good_as_torch(cuda.gram(x), ops.gram(x), x.double().mT @ x.double())


@pytest.mark.usefixtures("emulated")
def test_without_rows_it_is_zero_and_without_columns_nothing() -> None:
    assert torch.equal(cuda.gram(torch.empty(2, 0, 70)), torch.zeros(2, 70, 70))
    assert cuda.gram(torch.empty(0, 4, 5)).shape == (0, 5, 5)
    assert cuda.gram(torch.empty(3, 5, 0)).shape == (3, 0, 0)


@pytest.mark.usefixtures("emulated")
def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    x = torch.randn(20, 70)
    x[3, 4], x[5, 69] = float("nan"), float("inf")
    found, expected = cuda.gram(x), ops.gram(x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found == float("inf"), expected == float("inf"))


@pytest.mark.usefixtures("emulated")
def test_a_dtype_that_it_does_not_take_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"gram: .*invalid argument"):
        cuda.gram(torch.zeros(3, 3, dtype=torch.float64))
