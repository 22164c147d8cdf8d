from __future__ import annotations

import pytest
import torch

from dirmerge.ops.polar_step import polar_step

OP = "polar_step"


@pytest.mark.parametrize("shape", [(70, 33), (2, 33, 70), (20, 20), (1, 5), (0, 4, 3), (2, 5, 0)], ids=str)
def test_every_singular_value_is_mapped(dtype_of_backend: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b, c = 3.4, -4.8, 2.1
    x = (torch.randn(shape) / 12).to(dtype_of_backend)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    truth = (u * (a * s + b * s**3 + c * s**5).unsqueeze(-2)) @ vh
    found = polar_step(x, a, b, c)
    assert found.dtype == dtype_of_backend
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6, torch.float64: 1e-14}
    assert (found.double() - truth).norm() <= unit[dtype_of_backend] * truth.norm()


def test_it_commutes_with_rotations() -> None:
    x = torch.randn(30, 12, dtype=torch.float64) / 10
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    torch.testing.assert_close(polar_step(q @ x, 1.5, -0.5, 0), q @ polar_step(x, 1.5, -0.5, 0))


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match="must have dtype"):
        polar_step(torch.ones(3, 3, dtype=torch.int32), 1, 1, 1)
    with pytest.raises(ValueError, match="must have shape"):
        polar_step(torch.ones(3), 1, 1, 1)
