"""elect_merge: one pass over the tasks, against its composition of torch's element-wise functions."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import CORES, TASKS
from dirmerge import ops


@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "blocks"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_elect_merge(measure: Callable[..., None], core: str, is_masked: bool, backend: str) -> None:
    K = CORES[core]
    x = torch.randn(TASKS, K, K)
    thresholds = torch.full((TASKS,), 1.0)
    blocks = [K // TASKS] * TASKS if is_masked else None

    def check(result: torch.Tensor) -> None:
        kept = torch.where(x.abs() < 1, torch.zeros(()), x)
        sign = kept.double().sum(0).sign()
        chosen = kept * (kept.sign() == sign)
        truth = chosen.double().sum(0) / (chosen != 0).sum(0).clamp(min=1)
        if blocks is not None:
            truth *= torch.block_diag(*(torch.ones(r, r) for r in blocks))
        # Where the sides all but cancel, float32 may elect the other one.
        is_clear = kept.double().sum(0).abs() > 1e-5
        torch.testing.assert_close(result.double()[is_clear], truth[is_clear], rtol=1e-5, atol=0)

    entries = sum(r * r for r in blocks) if blocks else K * K
    measure(
        f"{TASKS} × {K}×{K}, {'blocks' if is_masked else 'all'}",
        backend,
        x.dtype,
        lambda: ops.elect_merge(x, thresholds, blocks=blocks),
        check,
        4 * (TASKS * entries + K * K),
    )
