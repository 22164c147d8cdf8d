# The functions below take arrays of every library, but are typed for tensors.
# mypy: disable-error-code="arg-type, list-item"

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dirmerge import arrays, linalg, ops


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass(frozen=True)
class Scaled:
    x: Tensor
    factor: float

    @arrays.of_any_kind
    def value(self) -> Tensor:
        return torch.mul(self.x, self.factor)


@arrays.of_any_kind
def double(x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    return 2 * x


@arrays.of_any_kind
def alias(x: Tensor) -> Tensor:
    return x[...]


@arrays.of_any_kind
def pair(x: Tensor, others: list[Tensor] | None = None, *, factor: float = 1.0) -> Pair:
    assert all(isinstance(other, Tensor) for other in others or [])
    return Pair(factor * x, torch.stack([x, *(others or [])]).sum(0))


@arrays.of_any_kind
def scaled(x: Tensor, factor: float) -> Scaled:
    return Scaled(x.clone(), factor)


class Foreign:
    """An array of a library that knows DLPack only; `strangers` is its package."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> type[Foreign]:
    library = types.ModuleType("strangers")
    stranger = type("Stranger", (Foreign,), {"__module__": "strangers.core"})
    library.from_dlpack = lambda x: stranger(np.from_dlpack(x))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strangers", library)
    return stranger


class TestNumPy:
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
    def test_no_copy_in_and_none_out(self, dtype: str) -> None:
        x = np.random.randn(5, 7).astype(dtype)
        for view in (x, x[::2, 1::3], x.T, x[:0], np.broadcast_to(x[0], (3, 7))):
            found = alias(view)
            assert type(found) is np.ndarray
            assert found.dtype == x.dtype
            np.testing.assert_array_equal(found, view)
            assert (
                found.__array_interface__["data"][0] == view.__array_interface__["data"][0] or not view.size
            )

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda x: x[::-1, ::-2], id="negative strides"),
            pytest.param(lambda x: x.astype(x.dtype.newbyteorder(">")), id="big-endian"),
            pytest.param(lambda x: x.astype("f8, f2")["f0"], id="strides between entries"),
            pytest.param(
                lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32), id="unaligned"
            ),
        ],
    )
    def test_what_torch_cannot_address_is_copied(self, make: Callable[[Any], Any]) -> None:
        x = make(np.random.randn(6, 8).astype(np.float32))
        found = double(x)
        assert np.asarray(found).dtype.isnative
        np.testing.assert_array_equal(found, 2 * x)

    def test_read_only_arrays_are_read_without_a_warning_or_a_write(self, tmp_path: Any) -> None:
        x = np.random.randn(4, 5).astype(np.float32)
        before = x.copy()
        x.flags.writeable = False
        np.save(tmp_path / "x.npy", before)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(double(x), 2 * before)
            np.testing.assert_array_equal(double(mapped), 2 * before)
        assert not x.flags.writeable
        np.testing.assert_array_equal(x, before)

    def test_a_lent_array_lives_as_long_as_its_tensor(self) -> None:
        for writeable in (True, False):
            x = np.full(1000, 3.0)
            x.flags.writeable = writeable
            found = alias(x)
            del x
            np.random.randn(1000)
            assert (found == 3).all()

    def test_integers_are_what_integer_tensors_are(self) -> None:
        np.testing.assert_array_equal(double(np.arange(4)), [0, 2, 4, 6])
        with pytest.raises(ValueError, match=r"x must be a floating-point tensor, got torch\.int64"):
            arrays.of_any_kind(linalg.polar)(np.eye(3, dtype=np.int64))
        with pytest.raises(TypeError, match=r"must have dtype bfloat16, .* got int32"):
            arrays.of_any_kind(ops.etf_project)(np.eye(3, dtype=np.int32))

    def test_dtypes_that_only_one_library_has_are_named(self) -> None:
        for x in (np.array(["a"]), np.array([None]), np.ones(3, np.longdouble), np.ones(3, "V2")):
            with pytest.raises(
                TypeError, match=f"double: x has dtype {re.escape(str(x.dtype))}, which torch"
            ):
                double(x)
        with pytest.raises(TypeError, match="double: x is a masked array: fill it first"):
            double(np.ma.masked_array([1.0, 2.0], [True, False]))
        with pytest.raises(TypeError, match="result is bfloat16, which NumPy lacks"):
            arrays.of_any_kind(lambda x: x.bfloat16())(np.ones(3))

    def test_zero_dimensions_and_subclasses(self) -> None:
        found = double(np.array(3.0))
        assert isinstance(found, np.ndarray)
        assert found.shape == ()
        subclass = np.ones(3).view(type("Subclass", (np.ndarray,), {}))
        assert type(double(subclass)) is np.ndarray


class TestResults:
    def test_tuples_and_lists(self) -> None:
        x = np.ones((2, 3))
        found = pair(x, [x, 2 * x], factor=0.5)
        assert isinstance(found, Pair)
        np.testing.assert_array_equal(found.first, 0.5 * x)
        np.testing.assert_array_equal(found.second, 4 * x)
        listed = arrays.of_any_kind(lambda x: [x, {"a": (x, "b")}])(x)
        assert listed[0] is not x
        assert isinstance(listed[1]["a"][0], np.ndarray)
        assert listed[1]["a"][1] == "b"

    def test_dataclasses_and_their_methods(self) -> None:
        x = np.ones((2, 3), dtype=np.float32)
        held = scaled(x, 2.0)
        assert isinstance(held.x, np.ndarray)
        np.testing.assert_array_equal(held.value(), 2 * x)
        assert isinstance(scaled(torch.ones(2), 2.0).value(), Tensor)

    def test_what_is_no_array_comes_back_as_it_is(self) -> None:
        assert arrays.of_any_kind(lambda x: float(x.sum()))(np.ones(3)) == 3.0
        assert arrays.of_any_kind(lambda x: None)(np.ones(3)) is None


class TestKinds:
    def test_a_call_mixes_none(self, foreign: type[Foreign]) -> None:
        x = np.ones(3)
        with pytest.raises(
            TypeError, match="pair: all arrays must be of one library, got x: numpy, others: torch"
        ):
            pair(x, [torch.ones(3)])
        with pytest.raises(TypeError, match="got x: torch, others: torch and numpy"):
            pair(torch.ones(3), [torch.ones(3), x])
        with pytest.raises(TypeError, match="got x: strangers, others: numpy"):
            pair(foreign(x), [x])

    def test_dlpack_shares_memory_both_ways(self, foreign: type[Foreign]) -> None:
        x = np.arange(6.0).reshape(2, 3)
        found: Any = alias(foreign(x))
        assert type(found) is foreign
        np.testing.assert_array_equal(found.array, x)
        assert found.array.__array_interface__["data"][0] == x.__array_interface__["data"][0]

    def test_a_dlpack_error_names_the_argument(self, foreign: type[Foreign]) -> None:
        with pytest.raises(TypeError, match="double: x "):
            double(foreign(np.array(["a"])))

    def test_others_reach_the_function(self) -> None:
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
            arrays.of_any_kind(linalg.polar)([[1.0]])

    def test_tensors_pass_untouched(self) -> None:
        x = torch.ones(3, requires_grad=True)
        assert double(x).requires_grad
        assert alias(x).data_ptr() == x.data_ptr()
        assert pair(x, []).first.requires_grad
        parameter = torch.nn.Parameter(torch.ones(2))
        assert double(parameter).requires_grad

    def test_signature_and_docstring_stay(self) -> None:
        wrapped = arrays.of_any_kind(linalg.polar)
        assert inspect.signature(wrapped) == inspect.signature(linalg.polar)
        assert wrapped.__doc__ == linalg.polar.__doc__

    def test_compiles_into_one_graph(self) -> None:
        elect = arrays.of_any_kind(ops.elect_merge)
        x = torch.randn(3, 6, 6)
        compiled = torch.compile(
            lambda x: elect(x, None, [1.0, 2.0, 3.0]), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x), elect(x, None, [1.0, 2.0, 3.0]))


class FakeCuPy:
    """What of CuPy the lending touches, with arrays in host memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[tuple[int, Any]] = []
        self.inside = False
        library: Any = types.ModuleType("cupy")
        stream = types.SimpleNamespace(ptr=4096)
        library.cuda = types.SimpleNamespace(get_current_stream=lambda device: stream)
        self.ndarray: Any = type(
            "ndarray", (Foreign,), {"__module__": "cupy", "device": types.SimpleNamespace(id=1)}
        )

        def from_dlpack(x: Any) -> Foreign:
            assert self.inside
            return self.ndarray(np.from_dlpack(x))

        library.from_dlpack = from_dlpack
        monkeypatch.setitem(sys.modules, "cupy", library)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: (ptr, device))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    def stream(self, external: Any) -> FakeCuPy:
        self.streams.append(external)
        return self

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *error: object) -> None:
        self.inside = False


class TestCuPy:
    def test_torch_works_on_the_stream_of_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cupy = FakeCuPy(monkeypatch)

        @arrays.of_any_kind
        def add(x: Tensor, y: Tensor) -> Tensor:
            assert cupy.inside
            return x + y

        x = np.ones(3)
        found: Any = add(cupy.ndarray(x), cupy.ndarray(2 * x))
        assert type(found) is cupy.ndarray
        np.testing.assert_array_equal(found.array, 3 * x)
        assert cupy.streams == [(4096, 1)]
        assert not cupy.inside

    def test_a_torch_without_cuda_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cupy = FakeCuPy(monkeypatch)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(TypeError, match="install torch for CUDA"):
            double(cupy.ndarray(np.ones(3)))

    def test_cupy_is_never_imported(self) -> None:
        code = (
            "import sys, numpy; from dirmerge import arrays, linalg; "
            "arrays.of_any_kind(linalg.polar)(numpy.eye(3)); sys.exit('cupy' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


A = np.random.default_rng(0).standard_normal((2, 12, 8))
CORES = np.random.default_rng(1).standard_normal((3, 6, 6)).astype(np.float32)
FRAME = np.linalg.qr(A[0])[0][:, :4]
LINALG: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("svd_truncated", (A.astype(np.float32), 3), {}),
    ("svd_truncated", (A, 3, "randomized"), {"seed": 1}),
    ("polar", (A.astype(np.float16),), {}),
    ("procrustes", (A, A[:, ::-1]), {"special": False}),
    ("simplex_etf", (4, 12), {"frame": FRAME}),
    ("etf_gap", (A[0],), {}),
    ("numerical_rank", (np.array([3.0, 1.0, 1e-20]), 12), {}),
    ("elect_merge", (CORES, np.ones(3, np.float32) / 2, [1.0, 2.0, 3.0]), {}),
    ("etf_project", (CORES,), {}),
    ("kth_largest_magnitude", (CORES, 4), {}),
]


def flat(value: Any) -> list[Any]:
    """The fields of a result, whose arrays all have the same kind."""
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"), LINALG, ids=[f"{i}-{case[0]}" for i, case in enumerate(LINALG)]
)
def test_linalg_takes_numpy_and_returns_it(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function = getattr(linalg, name)

    def tensor(value: Any) -> Any:
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    expected = function(*map(tensor, args), **{key: tensor(value) for key, value in kwargs.items()})
    for value in (*args, *kwargs.values()):
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    found = arrays.of_any_kind(function)(*args, **kwargs)
    assert type(found) is type(expected) or (isinstance(found, np.ndarray) and isinstance(expected, Tensor))
    for one, other in zip(flat(found), flat(expected), strict=True):
        if isinstance(other, Tensor):
            assert type(one) is np.ndarray
            assert str(one.dtype) == str(other.dtype).removeprefix("torch.")
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-6, atol=1e-6)
        else:
            assert one == other


def test_numpy_results_can_be_asked_on() -> None:
    svd = arrays.of_any_kind(linalg.svd_truncated)(A, 3)
    expected = linalg.svd_truncated(torch.from_numpy(A.copy()), 3)
    for name in ("energy", "residual"):
        value = arrays.of_any_kind(getattr(linalg.TruncatedSVD, name).fget)(svd)
        np.testing.assert_allclose(value, getattr(expected, name).numpy())
    np.testing.assert_allclose(
        arrays.of_any_kind(linalg.TruncatedSVD.dense)(svd.truncated(2)), expected.truncated(2).dense().numpy()
    )
    first, second = arrays.of_any_kind(linalg.TruncatedSVD.unbind)(svd)
    assert isinstance(first.total, np.ndarray)
    np.testing.assert_array_equal(second.u, svd.u[1])
    assert svd.rank == 3


def test_threads_share_nothing() -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda i=i: found.append(double(np.full(5, i)))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(x[0]) for x in found) == [2 * i for i in range(8)]
