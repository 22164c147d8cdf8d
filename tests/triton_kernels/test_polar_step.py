from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dirmerge.triton_kernels.elect_merge import elect_merge
from dirmerge.triton_kernels.polar_step import polar_step
from torch.utils._python_dispatch import TorchDispatchMode

from dirmerge.ops.polar_step import polar_step as polar_step_op

QUINTIC = (15 / 8, -10 / 8, 3 / 8)


@pytest.mark.parametrize("shape", [(70, 33), (2, 33, 70), (1, 1), (80, 80)], ids=str)
def test_is_the_polynomial(
    shape: tuple[int, ...], dtype: torch.dtype, as_good_as_torch: Callable[..., None]
) -> None:
    x = torch.randn(shape)
    x = (x / torch.linalg.matrix_norm(x, 2)[..., None, None]).to(dtype)
    a, b, c = 3.4, -4.8, 2.1
    gram = x.double().mT @ x.double()
    identity = torch.eye(shape[-1], dtype=torch.float64)
    truth = x.double() @ (a * identity + b * gram + c * gram @ gram)
    as_good_as_torch(polar_step(x, a, b, c), polar_step_op(x, a, b, c), truth)


def test_the_polynomial_is_finer_than_bfloat16() -> None:
    # A rounding of the polynomial itself to bfloat16 would be an error of 2⁻⁹ before that of the result.
    x = torch.linalg.qr(torch.randn(64, 48)).Q.bfloat16()
    gram = x.double().mT @ x.double()
    truth = x.double() @ (0.7 * torch.eye(48, dtype=torch.float64) + 0.21 * gram + 0.0813 * gram @ gram)
    found = polar_step(x, 0.7, 0.21, 0.0813)
    best = (truth.bfloat16().double() - truth).norm()
    assert (found.double() - truth).norm() <= 1.01 * best


def test_steps_converge_to_the_polar_factor() -> None:
    u, _, vh = torch.linalg.svd(torch.randn(2, 40, 24, dtype=torch.float64), full_matrices=False)
    x = (u * torch.linspace(0.3, 1, 24, dtype=torch.float64)) @ vh
    y = x.float()
    for _ in range(6):
        y = polar_step(y, *QUINTIC)
    torch.testing.assert_close(y.double(), u @ vh, rtol=0, atol=2e-6)


def test_views_and_empty_batches(as_good_as_torch: Callable[..., None]) -> None:
    x = torch.randn(3, 80, 66)[::2, ::2].mT / 20
    truth = polar_step_op(x.double(), *QUINTIC)
    as_good_as_torch(polar_step(x, *QUINTIC), polar_step_op(x, *QUINTIC), truth)
    for shape in ((0, 4, 3), (2, 5, 0)):
        assert polar_step(torch.empty(shape), *QUINTIC).shape == shape


class Recorder(TorchDispatchMode):
    """Collects the names of the torch functions that run, Triton's interpreter's own among them."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_nothing_that_a_cuda_graph_cannot_capture() -> None:
    # Reading a value, or a tensor made from a list on the host, whose copy a replay would find overwritten.
    host = {"_local_scalar_dense", "lift_fresh", "_pin_memory", "nonzero", "is_nonzero", "scalar_tensor"}
    for x in (torch.randn(2, 40, 24), torch.randn(24, 40).bfloat16(), torch.randn(40, 24).half()):
        with Recorder() as recorder:
            polar_step(polar_step(x / 20, *QUINTIC), *QUINTIC)
        assert "new_empty" in recorder.called
        assert not recorder.called & host
    with Recorder() as recorder:
        elect_merge(torch.randn(2, 5, 5), None, [1.0, 2.0])
    assert recorder.called & host
