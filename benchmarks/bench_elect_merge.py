"""elect_merge: one pass over the tasks, against its composition of torch's element-wise functions."""

from collections.abc import Callable

import torch

from benchmarks import competitors
from benchmarks.shapes import TASKS, Core
from dirmerge import ops

OP, CUPY = "elect_merge", True


def test_elect_merge(measure: Callable[..., None], core: Core, dtype: torch.dtype, backend: str) -> None:
    K = core.K
    x = torch.randn(TASKS, K, K).to(dtype)
    thresholds = torch.full((TASKS,), 1.0, dtype=dtype)

    def check(result: torch.Tensor) -> None:
        kept = torch.where(x.abs() < 1, torch.zeros((), dtype=dtype), x)
        total = kept.double().sum(0)
        chosen = kept * (kept.sign() == total.sign())
        truth = chosen.double().sum(0) / (chosen != 0).sum(0).clamp(min=1)
        # Where the sides all but cancel, float32 may elect the other one.
        is_clear = total.abs() > 1e-5
        rtol = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(result.double()[is_clear], truth[is_clear], rtol=rtol, atol=0)

    measure(
        f"{TASKS} × {core}",
        backend,
        dtype,
        lambda: ops.elect_merge(x, thresholds),
        check,
        dtype.itemsize * (TASKS + 1) * K * K,
        cupy=(competitors.elect_merge, [x, thresholds]),
    )
