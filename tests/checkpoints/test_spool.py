"""Temporary tensors: they come back as they were, and leave no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dirmerge.checkpoints.spool import Spool
from dirmerge.deltas.lowrank import LowRank
from dirmerge.errors import OutputError


class TestSpool:
    def test_gives_back_what_was_put(self, tmp_path: Path) -> None:
        values: dict[str, Any] = {
            "dense": torch.randn(5, 3),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "strided": torch.randn(4, 6).mT,
            "empty": torch.empty(0, 3),
            "factored": LowRank(torch.randn(5, 2), torch.randn(2, 2), torch.randn(4, 2)),
            "no core": LowRank(torch.randn(5, 2), None, torch.randn(4, 2)),
        }
        with Spool(tmp_path) as spool:
            for name, value in values.items():
                assert name not in spool
                spool.put(name, value)
            for name in reversed(values):
                value, got = values[name], spool.get(name)
                assert name in spool
                if isinstance(value, LowRank):
                    assert isinstance(got, LowRank)
                    assert torch.equal(got.left, value.left)
                    assert torch.equal(got.right, value.right)
                    assert (got.core is None) == (value.core is None)
                    assert value.core is None or torch.equal(got.core, value.core)
                else:
                    assert isinstance(got, torch.Tensor)
                    assert got.dtype == value.dtype
                    assert torch.equal(got, value)
            # what is handed out is the caller's
            got = spool.get("dense")
            assert isinstance(got, torch.Tensor)
            got.zero_()
            assert torch.equal(spool.get("dense"), values["dense"])  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="'dense' is in the spool"):
                spool.put("dense", values["dense"])
            with pytest.raises(KeyError):
                spool.get("missing")
        assert list(tmp_path.iterdir()) == []

    def test_leaves_no_name_behind(self, tmp_path: Path) -> None:
        # so that nothing remains of a killed process, and nothing of it is committed
        spool = Spool(tmp_path)
        spool.put("a", torch.zeros(100))
        assert list(tmp_path.iterdir()) == []
        spool.close()

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="missing: cannot hold temporary files"):
            Spool(tmp_path / "missing")
