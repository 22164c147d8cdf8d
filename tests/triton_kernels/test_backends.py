from __future__ import annotations

import pytest
import torch
from dirmerge.triton_kernels.gram import gram

from dirmerge import backends, ops


def test_every_launcher_is_found_when_it_is_asked_for() -> None:
    x = torch.randn(3, 20, 20)
    rotation = torch.eye(20).expand(3, 20, 20)
    calls = {
        "delta_sketch": lambda: ops.delta_sketch(x[0], x, width=3),
        "elect_merge": lambda: ops.elect_merge(x),
        "etf_project": lambda: ops.etf_project(x),
        "gram": lambda: ops.gram(x),
        "kth_largest_magnitude": lambda: ops.kth_largest_magnitude(x, 3),
        "lowrank_add": lambda: ops.lowrank_add(x[0], x[1], x[2]),
        "polar_step": lambda: ops.polar_step(x / 20, 1.5, -0.5, 0),
        "rotation_step": lambda: ops.rotation_step(rotation, x, rate=0.1),
    }
    assert set(calls) == {op for op, name in backends._implementations if name == "triton"}
    for name, call in calls.items():
        with backends.backend("triton"):
            found = call()
        with backends.backend("torch"):
            expected = call()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


def test_auto_never_interprets(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("the interpreter is for CPU tensors")
    chosen = backends.select("gram", torch.device("cpu"), torch.float32)
    assert chosen is backends.implementations("gram", "cpu")["torch"].function
    with backends.backend("triton"):
        x = torch.randn(5, 4)
        assert torch.equal(ops.gram(x), gram(x))
        with pytest.raises(RuntimeError, match="takes bfloat16, float16, float32, not float64"):
            ops.gram(x.double())
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        backends._select.cache_clear()
        with pytest.raises(RuntimeError, match="runs on cuda, not on cpu"):
            ops.gram(x)
    backends._select.cache_clear()


def test_cuda_prefers_the_tensor_cores_of_triton() -> None:
    chosen = backends.select("gram", torch.device("cuda"), torch.bfloat16)
    assert chosen is backends.implementations("gram", "cuda")["triton"].function
    double = backends.select("gram", torch.device("cuda"), torch.float64)
    assert double is backends.implementations("gram", "cuda")["torch"].function
