from __future__ import annotations

from typing import Any

import pytest
import torch

from dirmerge.ops.rotation_step import rotation_step

OP = "rotation_step"


def rotations(T: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    skew = torch.randn(T, d, d, dtype=torch.float64)
    return torch.linalg.matrix_exp(skew - skew.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5])
def test_is_the_retracted_step_and_stays_a_rotation(dtype: torch.dtype, rate: float) -> None:
    R, gradient = rotations(2, 33, dtype), torch.randn(2, 33, 33)
    wide, steep = R.double(), gradient.double()
    u, _, vh = torch.linalg.svd(wide - rate * wide @ (wide.mT @ steep - steep.mT @ wide) / 2)
    found = rotation_step(R, gradient, rate=rate)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert (found.rotation.double() - u @ vh).norm() <= tolerance * 66**0.5
    assert (found.deviation <= tolerance).all()
    assert (torch.linalg.det(found.rotation.double()) > 0.99).all()


def test_steps_descend_to_the_nearest_rotation() -> None:
    target, R = rotations(1, 6, torch.float64), torch.eye(6, dtype=torch.float64).expand(1, 6, 6)
    before = (R - target).norm()
    for _ in range(300):
        R = rotation_step(R, R - target, rate=0.5).rotation
    assert (R - target).norm() < 1e-3 * before


def test_errors_of_the_rotation_are_taken_away() -> None:
    R = rotations(1, 20, torch.float64) + 1e-3 * torch.randn(1, 20, 20, dtype=torch.float64)
    found = rotation_step(R, torch.zeros(1, 20, 20), rate=0.1)
    assert (found.deviation <= 1e-14).all()


def test_a_step_too_large_for_the_steps_shows() -> None:
    found = rotation_step(torch.eye(16), 1e4 * torch.randn(16, 16), rate=1.0, steps=2)
    assert found.deviation > 0.1


def test_arguments_are_checked() -> None:
    eye = torch.eye(3)
    with pytest.raises(TypeError, match="must be float32 or float64"):
        rotation_step(eye.half(), eye, rate=0.1)
    cases: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any], str]] = [
        (torch.ones(3, 4), torch.ones(3, 4), {"rate": 0.1}, "rotation must have shape"),
        (eye, torch.ones(2, 3, 3), {"rate": 0.1}, "gradient must have the shape"),
        (eye, eye, {"rate": float("nan")}, "rate must be finite"),
        (eye, eye, {"rate": 0.1, "steps": 0}, "steps must be at least 1"),
    ]
    for rotation, gradient, options, message in cases:
        with pytest.raises(ValueError, match=message):
            rotation_step(rotation, gradient, **options)
