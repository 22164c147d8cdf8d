from __future__ import annotations

import numpy as np
import pytest
import torch

from dirmerge.ops.delta_sketch import _philox, delta_sketch, random_signs

OP = "delta_sketch"


def test_philox_gives_the_published_numbers() -> None:
    # Known answers of Philox4x32-10 from the authors' Random123 library (kat_vectors).
    for counter, key, expected in (
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        found = _philox(key, [torch.tensor([word]) for word in counter])
        assert [int(word) for word in found] == expected


def test_signs_are_balanced_and_uncorrelated() -> None:
    signs = random_signs(2000, 300, seed=7, dtype=torch.float64)
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert signs.mean().abs() <= 5 / (2000 * 300) ** 0.5
    correlation = (signs.T @ signs / 2000 - torch.eye(300)).abs().max()
    assert correlation <= 6 / 2000**0.5
    assert torch.equal(random_signs(50, 130, seed=7), signs[:50, :130].float())
    assert not torch.equal(random_signs(50, 130, seed=7 + 2**32), signs[:50, :130].float())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("given", [None, 2, 3])
@pytest.mark.parametrize("m_n", [(33, 70), (1, 5), (70, 1)], ids=str)
def test_is_the_product_with_the_difference(
    dtype_of_backend: torch.dtype, transposed: bool, given: int | None, m_n: tuple[int, int]
) -> None:
    base = torch.randn(m_n).to(dtype_of_backend)
    finetuned = torch.randn(3, *m_n).to(dtype_of_backend)
    rows = m_n[0 if transposed else 1]
    test = None if given is None else torch.randn(*((3,) if given == 3 else ()), rows, 20)
    width = None if given else 150
    found = delta_sketch(base, finetuned, test=test, width=width, seed=2**40, transposed=transposed)
    differences = finetuned.double() - base.double()
    factor = random_signs(rows, 150, 2**40) if test is None else test
    truth = (differences.mT if transposed else differences) @ factor.double()
    double = dtype_of_backend == torch.float64
    assert found.value.dtype == (torch.float64 if double else torch.float32)
    assert (found.value.double() - truth).norm() <= (1e-14 if double else 1e-6) * truth.norm()
    torch.testing.assert_close(found.sum_of_squares, differences.square().sum((1, 2)), rtol=1e-6, atol=0)
    assert found.nonfinite.tolist() == [0, 0, 0]


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # The module's name in its package is that of the function.
    monkeypatch.setitem(delta_sketch.__globals__, "_PIECE", 300)
    base, finetuned = torch.randn(50, 40), torch.randn(2, 50, 40)
    for transposed in (False, True):
        found = delta_sketch(base, finetuned, width=9, transposed=transposed)
        difference = (finetuned - base).mT if transposed else finetuned - base
        torch.testing.assert_close(found.value, difference @ random_signs(difference.shape[2], 9, 0))


def test_mixed_dtypes_views_and_no_tasks() -> None:
    base = torch.randn(70, 33).T.bfloat16()
    finetuned = [torch.randn(33, 70), torch.randn(70, 33).T]
    found = delta_sketch(base, finetuned, width=5)
    truth = (torch.stack(finetuned) - base.float()) @ random_signs(70, 5, 0)
    torch.testing.assert_close(found.value, truth)
    assert delta_sketch(base, [w.double() for w in finetuned], width=5).value.dtype == torch.float64
    assert delta_sketch(base, [], width=5).value.shape == (0, 33, 5)


def test_what_is_not_finite_is_counted_per_task() -> None:
    finetuned = torch.randn(3, 8, 6)
    finetuned[0, 3, 4] = float("nan")
    finetuned[2, 0] = float("inf")
    found = delta_sketch(torch.zeros(8, 6), finetuned, width=2)
    assert found.nonfinite.tolist() == [1, 0, 6]
    assert found.sum_of_squares.isfinite().tolist() == [False, True, False]


def test_the_sketch_spans_the_leading_directions() -> None:
    # Rank 10 with a tail of 1e-3: sixteen columns catch all but the tail.
    u = torch.linalg.qr(torch.randn(90, 10, dtype=torch.float64)).Q
    delta = u @ torch.randn(10, 60, dtype=torch.float64) + 1e-4 * torch.randn(90, 60, dtype=torch.float64)
    found = delta_sketch(torch.zeros(90, 60, dtype=torch.float64), [delta], width=16)
    q = torch.linalg.qr(found.value[0]).Q
    assert (delta - q @ (q.T @ delta)).norm() <= 0.02 * delta.norm()


def test_arguments_are_checked() -> None:
    base, finetuned = torch.ones(4, 3), torch.ones(2, 4, 3)
    for options, message in (
        ({}, "exactly one of test and width"),
        ({"width": 2, "test": torch.ones(3, 2)}, "exactly one of test and width"),
        ({"width": 0}, "width must be at least 1"),
        ({"width": 2, "seed": -1}, "seed must be from 0"),
        ({"test": torch.ones(4, 2)}, r"test must have shape \(3, s\)"),
        ({"test": torch.ones(3, 3, 2)}, r"or \(2, 3, s\)"),
    ):
        with pytest.raises(ValueError, match=message):
            delta_sketch(base, finetuned, **options)
    with pytest.raises(ValueError, match=r"finetuned\[1\] must have the shape of base"):
        delta_sketch(base, [base, base.T], width=1)
    with pytest.raises(TypeError, match="one dtype"):
        delta_sketch(base, [base, base.half()], width=1)
    with pytest.raises(TypeError, match=r"finetuned\[0\] must be a torch.Tensor"):
        delta_sketch(base, [np.ones((4, 3))], width=1)  # type: ignore[list-item]
