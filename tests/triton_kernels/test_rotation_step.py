from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.rotation_step import rotation_step

from dirmerge.ops.rotation_step import rotation_step as rotation_step_op


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_is_the_retracted_step(rate: float, as_good_as_torch: Callable[..., None]) -> None:
    rotation = torch.linalg.matrix_exp(torch.randn(2, 33, 33).triu(1) - torch.randn(2, 33, 33).triu(1).mT)
    rotation = torch.linalg.qr(rotation).Q
    gradient = torch.randn(2, 33, 33)
    R, G = rotation.double(), gradient.double()
    u, _, vh = torch.linalg.svd(R - rate * R @ (R.mT @ G - G.mT @ R) / 2)
    found, deviation = rotation_step(rotation, gradient, rate=rate)
    expected, _ = rotation_step_op(rotation, gradient, rate=rate)
    as_good_as_torch(found, expected, u @ vh)
    assert (deviation <= 1e-6).all()
    assert torch.equal(torch.linalg.det(found).sign(), torch.linalg.det(rotation).sign())


def test_a_step_too_large_for_the_steps_shows() -> None:
    rotation, gradient = torch.eye(16), 1e4 * torch.randn(16, 16)
    _, deviation = rotation_step(rotation, gradient, rate=1.0, steps=2)
    assert deviation > 0.1


def test_views_and_empty_batches() -> None:
    rotation = torch.linalg.qr(torch.randn(20, 20)).Q.T
    gradient = torch.randn(20, 40)[:, ::2]
    found, expected = (f(rotation, gradient, rate=0.1) for f in (rotation_step, rotation_step_op))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-6)
    assert rotation_step(torch.empty(0, 4, 4), torch.empty(0, 4, 4), rate=0.1)[1].shape == (0,)
