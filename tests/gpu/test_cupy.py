"""CuPy arrays on a GPU, and the kernels that NVRTC compiles for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dirmerge import arrays, linalg, ops
from dirmerge.backends import cuda, nvrtc

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible to torch", allow_module_level=True)
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")


@pytest.fixture
def by_nvrtc(monkeypatch: pytest.MonkeyPatch) -> nvrtc.Library:
    found, reason = nvrtc.load(str(cuda.sources()))
    assert found is not None, reason
    monkeypatch.setattr(cuda, "library", lambda: found)
    return found


def array(*shape: int, dtype: str = "float32") -> Any:
    return cupy.asarray(np.random.randn(*shape).astype(dtype))


@pytest.mark.parametrize("own_stream", [False, True])
def test_linalg_takes_cupy_and_returns_it(own_stream: bool) -> None:
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    with stream:
        x = array(300, 40)
        for _ in range(20):
            # Work on the stream that the result must wait for, and memory that may be given out again.
            x = x * 1.01 + 0
            found = arrays.of_any_kind(linalg.polar)(x)
            assert isinstance(found.q, cupy.ndarray)
            assert isinstance(found.rank, cupy.ndarray)
            gram = cupy.asnumpy(found.q.T @ found.q)
            del found
            np.testing.assert_allclose(gram, np.eye(40), atol=1e-4)


def test_no_copy_is_made() -> None:
    x = array(5, 7)
    same = arrays.of_any_kind(lambda x: x[...])(x)
    assert same.data.ptr == x.data.ptr


def test_ops_take_cupy() -> None:
    x = array(3, 50, 50)
    found = arrays.of_any_kind(ops.kth_largest_magnitude)(x, 100)
    expected = np.sort(np.abs(cupy.asnumpy(x)).reshape(3, -1), axis=1)[:, -100]
    np.testing.assert_array_equal(cupy.asnumpy(found), expected)
    with pytest.raises(TypeError, match="all arrays must be of one library"):
        arrays.of_any_kind(linalg.procrustes)(x, cupy.asnumpy(x))


@pytest.mark.usefixtures("by_nvrtc")
def test_kernels_by_nvrtc_are_right() -> None:
    x = torch.randn(3, 130, 70, device="cuda")
    exact = x.double()
    torch.testing.assert_close(cuda.gram(x).double(), exact.mT @ exact, rtol=1e-5, atol=1e-4)
    centred = (exact - exact.mean(1, keepdim=True)) * (130 / 129)
    torch.testing.assert_close(cuda.etf_project(x).double(), centred, rtol=1e-5, atol=1e-5)
    assert torch.equal(cuda.kth_largest_magnitude(x, 99), x.abs().flatten(1).sort(1).values[:, -99])
    torch.testing.assert_close(cuda.elect_merge(x), ops.elect_merge(x.cpu()).cuda())


def test_kernels_by_nvrtc_run_on_the_current_stream(by_nvrtc: nvrtc.Library) -> None:
    assert "NVRTC" in by_nvrtc.build_info()["compiler"]
    x = torch.randn(256, 64, device="cuda")
    cuda.gram(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cuda.gram(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-3)
