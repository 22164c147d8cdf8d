from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dirmerge.triton_kernels.gram import gram

from dirmerge import backends, ops
from dirmerge.backends import table


def test_every_launcher_is_found_when_it_is_asked_for() -> None:
    x = torch.randn(3, 20, 20)
    rotation = torch.eye(20).expand(3, 20, 20)
    calls: dict[str, Callable[[], Any]] = {
        "delta_sketch": lambda: ops.delta_sketch(x[0], x, width=3),
        "elect_merge": lambda: ops.elect_merge(x),
        "etf_project": lambda: ops.etf_project(x),
        "gram": lambda: ops.gram(x),
        "kth_largest_magnitude": lambda: ops.kth_largest_magnitude(x, 3),
        "lowrank_add": lambda: ops.lowrank_add(x[0], x[1], x[2]),
        "polar_step": lambda: ops.polar_step(x / 20, 1.5, -0.5, 0),
        "rotation_step": lambda: ops.rotation_step(rotation, x, rate=0.1),
    }
    assert set(calls) == {op for op, name in table._implementations if name == "triton"}
    for name, call in calls.items():
        with backends.backend("triton"):
            found = call()
        with backends.backend("torch"):
            expected = call()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


def test_the_callers_default_device_does_not_matter(device: str) -> None:
    if device != "cpu":
        pytest.skip("the interpreter alone runs on tensors of another device than the default one")
    x = torch.randn(3, 20, 20)
    rotation, thresholds = torch.eye(20).repeat(3, 1, 1), torch.ones(3)
    # The launchers themselves: inside of a torch op no default device is in force.
    calls: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "delta_sketch": ([x[0], list(x)], {"width": 3}),
        "elect_merge": ([x, thresholds, [1.0, 2.0, 3.0]], {}),
        "etf_project": ([x], {}),
        "gram": ([x], {}),
        "kth_largest_magnitude": ([x, 3], {}),
        "lowrank_add": ([x[0], x[1], x[2]], {}),
        "polar_step": ([x / 20, 1.5, -0.5, 0.0], {}),
        "rotation_step": ([rotation, x], {"rate": 0.1}),
    }
    assert set(calls) == {op for op, name in table._implementations if name == "triton"}
    for name, (args, kwargs) in calls.items():
        launcher = getattr(importlib.import_module(f"dirmerge.triton_kernels.{name}"), name)
        expected = launcher(*args, **kwargs)
        # "meta" stands for a GPU: a tensor that is made without its device lands there and holds nothing.
        with torch.device("meta"):
            found = launcher(*args, **kwargs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)


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
        table._select.cache_clear()
        with pytest.raises(RuntimeError, match="runs on cuda, not on cpu"):
            ops.gram(x)
    table._select.cache_clear()


def test_cuda_prefers_the_tensor_cores_of_triton() -> None:
    chosen = backends.select("gram", torch.device("cuda"), torch.bfloat16)
    assert chosen is backends.implementations("gram", "cuda")["triton"].function
    double = backends.select("gram", torch.device("cuda"), torch.float64)
    assert double is backends.implementations("gram", "cuda")["torch"].function
