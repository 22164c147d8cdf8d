from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import dirmerge
from dirmerge import backends, doctor, ops
from dirmerge.backends import cuda, table

NATIVE_MISSING = isinstance(backends.native_build_info(), str)
needs_native = pytest.mark.skipif(NATIVE_MISSING, reason="the native library is not built")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op whose implementations return their names: on a CPU the native one takes float32 only."""
    monkeypatch.setattr(table, "_implementations", {})
    monkeypatch.setattr(table, "_native", object())
    table._select.cache_clear()

    @backends.implements("probe", "torch")
    def _torch() -> str:
        return "torch"

    @backends.implements("probe", "native", devices=("cpu",), dtypes=(torch.float32,))
    def _native() -> str:
        return "native"

    @backends.implements("probe", "triton", devices=("cuda",))
    def _triton() -> str:
        return "triton"

    yield "probe"
    table._select.cache_clear()


def chosen(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    name: str = backends.select(op, torch.device(device), dtype)()
    return name


def test_auto_takes_the_first_that_can(probe: str) -> None:
    assert chosen(probe) == "native"
    assert chosen(probe, dtype=torch.float64) == "torch"
    assert chosen(probe, device="mps") == "torch"


@pytest.fixture
def with_cuda(probe: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same op with a native implementation for CUDA too, whose library is there."""
    monkeypatch.setattr(cuda, "missing", lambda: "")
    monkeypatch.setattr(table, "triton_missing", lambda: "")

    @backends.implements("probe", "native", devices=("cuda",), dtypes=(torch.bfloat16, torch.float32))
    def _cuda() -> str:
        return "cuda"

    return probe


def test_native_is_another_kernel_on_each_device(with_cuda: str) -> None:
    assert chosen(with_cuda) == "native"
    assert chosen(with_cuda, device="cuda") == "cuda"
    assert chosen(with_cuda, device="cuda", dtype=torch.bfloat16) == "cuda"
    assert chosen(with_cuda, dtype=torch.bfloat16) == "torch"
    assert chosen(with_cuda, device="cuda", dtype=torch.float64) == "triton"
    with (
        backends.backend("native"),
        pytest.raises(RuntimeError, match="runs on cpu, cuda, not on mps"),
    ):
        chosen(with_cuda, device="mps")


def test_an_op_may_prefer_another_order(with_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_PREFERENCE_OF", {"probe": ("triton", "native", "torch")})
    assert chosen(with_cuda, device="cuda") == "triton"
    assert chosen(with_cuda) == "native"
    assert backends.preference("gram") == backends.PREFERENCE


def test_without_the_cuda_library_its_kernels_are_not_chosen(
    with_cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "missing", lambda: "no nvcc")
    assert chosen(with_cuda, device="cuda") == "triton"
    assert chosen(with_cuda) == "native"
    with (
        backends.backend("native"),
        pytest.raises(RuntimeError, match=r'backend\("native"\) was asked for, but no nvcc'),
    ):
        chosen(with_cuda, device="cuda")


def test_a_forced_backend_is_taken_and_given_back(probe: str) -> None:
    with backends.backend("torch"):
        assert chosen(probe) == "torch"
        with backends.backend("native"):
            assert chosen(probe) == "native"
        assert chosen(probe) == "torch"
    with pytest.raises(KeyError), backends.backend("torch"):
        raise KeyError
    assert chosen(probe) == "native"


def test_a_forced_backend_that_is_missing_says_why(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with backends.backend("native"):
        with pytest.raises(RuntimeError, match="takes float32, not float64"):
            chosen(probe, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="runs on cpu, not on cuda"):
            chosen(probe, device="cuda")
        with pytest.raises(RuntimeError, match="other has no native kernel"):
            chosen("other")
        monkeypatch.setattr(table, "_native", None)
        monkeypatch.setattr(table, "_native_missing", "no compiler")
        table._select.cache_clear()
        with pytest.raises(RuntimeError, match=r'backend\("native"\) was asked for, but no compiler'):
            chosen(probe)
    assert chosen(probe) == "torch"


def test_an_unknown_backend_is_named() -> None:
    with (
        pytest.raises(ValueError, match="must be one of auto, native, triton, torch, got 'cuda'"),
        backends.backend("cuda"),
    ):
        pass


def test_the_choice_stays_in_its_thread(probe: str) -> None:
    seen: list[str] = []
    with backends.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(chosen(probe)))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_the_table_has_every_op_and_dtype_and_the_reason_for_torch() -> None:
    rows = {(row.op, row.dtype): row for row in doctor.table() if row.device == "cpu"}
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert public <= {op for op, _ in rows}
    assert set(rows) == {(op, dtype) for op, _ in rows for dtype in backends.FLOATING}
    for row in rows.values():
        assert (row.implementation == "torch") == bool(row.reason)
    assert rows["polar_step", torch.float32].reason == "polar_step has no native kernel"
    assert (
        rows["etf_project", torch.float32].reason
        == "the native kernel of etf_project runs on cuda, not on cpu"
    )


def test_the_table_says_what_runs() -> None:
    for row in doctor.table():
        if row.device == "cpu":
            function = backends.select(row.op, torch.device("cpu"), row.dtype)
            assert function is backends.implementations(row.op, "cpu")[row.implementation].function


@needs_native
def test_build_info_names_version_and_compiler() -> None:
    info = backends.native_build_info()
    assert isinstance(info, dict)
    assert info["version"] == dirmerge.__version__
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang", "MSVC")
    assert info["runs_on"] in info["built_for"].split()


WITHOUT_NATIVE = """
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "dirmerge._C" else find(name, package)
from dirmerge import backends, doctor, ops
reason = backends.native_build_info()
assert isinstance(reason, str) and "C++17 compiler" in reason and "DIRMERGE_NATIVE" in reason, reason
a, b = torch.randn(2, 20, 30)
assert torch.equal(ops.delta(a, b).value, a - b)
assert torch.equal(ops.lowrank_add(a.bfloat16(), a[:, :2], torch.zeros(30, 2)), a.bfloat16())
assert {row.implementation for row in doctor.table()} == {"torch"}
try:
    with backends.backend("native"):
        ops.delta(a, b)
except RuntimeError as error:
    assert reason in str(error)
else:
    raise SystemExit("a missing backend did not raise")
"""


def test_everything_works_without_the_native_library() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_NATIVE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_native
class TestNumPy:
    """dirmerge._C takes NumPy arrays as they are, and refuses what it cannot read."""

    def test_delta(self) -> None:
        C = backends.native()
        finetuned = np.random.randn(5, 7).astype(np.float16)
        base = np.random.randn(5, 7).astype(np.float32)
        value = np.full((5, 7), np.nan, dtype=np.float32)
        total, nonfinite = C.delta(finetuned, base, value, threads=1)
        np.testing.assert_array_equal(value, finetuned.astype(np.float32) - base)
        assert total == pytest.approx((value.astype(np.float64) ** 2).sum(), rel=1e-14)
        assert nonfinite == 0

    def test_kth_largest_magnitude(self) -> None:
        x = np.random.randn(3, 50)
        result = np.empty(3)
        backends.native().kth_largest_magnitude(x, 7, result, threads=1)
        np.testing.assert_array_equal(result, np.sort(np.abs(x), axis=1)[:, -7])

    def test_elect_merge(self) -> None:
        x = np.array([[[1.0, 2], [3, 4]], [[-2, 2], [1, 4]]], dtype=np.float32)
        result = np.full((2, 2), np.nan, dtype=np.float32)
        backends.native().elect_merge(x, None, [1.0, 1.0], result, threads=1)
        np.testing.assert_array_equal(result, [[-2, 2], [2, 4]])

    def test_lowrank_add(self) -> None:
        base = np.random.randn(6, 9).astype(np.float16)
        update = np.random.randn(6, 9).astype(np.float32)
        result = np.empty((6, 9), dtype=np.float16)
        backends.native().lowrank_add(base, update, 2.0, result, threads=1)
        np.testing.assert_array_equal(result, (base + 2 * update).astype(np.float16))

    def test_arrays_that_do_not_fit_are_refused(self) -> None:
        C = backends.native()
        x = np.zeros((4, 6), dtype=np.float32)
        out = np.zeros((4, 6), dtype=np.float32)
        with pytest.raises(ValueError, match="delta: finetuned and base must have the same shape"):
            C.delta(x, x[:3], out, threads=1)
        with pytest.raises(ValueError, match="delta: finetuned and base must be contiguous"):
            C.delta(x[:, ::2], x[:, ::2], out[:, ::2], threads=1)
        with pytest.raises(ValueError, match="delta: the output has the wrong shape"):
            C.delta(x, x, out[:3], threads=1)
        with pytest.raises(ValueError, match="delta: the output has the wrong dtype"):
            C.delta(x, x, out.astype(np.float64), threads=1)
        out.flags.writeable = False
        with pytest.raises(ValueError, match="delta: the output must be writable"):
            C.delta(x, x, out, threads=1)
        with pytest.raises(ValueError, match="k must be from 1 to the size"):
            C.kth_largest_magnitude(x, 7, np.zeros(4, dtype=np.float32), threads=1)
        with pytest.raises(ValueError, match=r"elect_merge: x must have shape .* each x\[t\] contiguous"):
            C.elect_merge(x[None, :, ::2], None, None, np.zeros((4, 3), dtype=np.float32), threads=1)
        with pytest.raises(TypeError):
            C.delta(x.astype(np.int32), x, out, threads=1)
        with pytest.raises(ValueError, match="lowrank_add: base must be bfloat16 or float16"):
            C.lowrank_add(x, x, 1.0, np.zeros((4, 6), dtype=np.float32), threads=1)
