"""The shadow GPU itself: each fault is caught, and the right program passes."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch

import dirmerge
from dirmerge.methods import METHODS
from shadow import RaceError


def test_tensors_say_cuda_and_compute(shadow_gpu):
    x, y = torch.randn(8, 5), torch.randn(5, 3)
    with shadow_gpu() as gpu:
        a, b = x.to("cuda"), y.to("cuda")
        assert a.is_cuda
        assert a.device == torch.device("cuda", 0)
        c = a @ b + torch.ones(3, device="cuda")
        found = c.cpu()
    assert torch.equal(found, x @ y + 1)
    assert gpu.bytes_in == 4 * (40 + 15)
    assert gpu.bytes_out == 4 * 24
    products = [launch for launch in gpu.launches if launch.op == "mm"]
    assert [launch.flops for launch in products] == [2 * 8 * 5 * 3]
    assert products[0].shapes == ((8, 5), (5, 3), (8, 3))


def test_devices_are_not_mixed(shadow_gpu):
    with shadow_gpu(devices=2):
        a, b = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        with pytest.raises(RuntimeError, match="same device"):
            a + b
        with pytest.raises(RuntimeError, match="same device"):
            a + torch.ones(2)
        assert torch.equal((a + b.to("cuda:0")).cpu(), torch.full((2,), 2.0))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to("cuda"),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
)
def test_what_makes_the_host_wait_is_counted(shadow_gpu, wait):
    with shadow_gpu() as gpu:
        x = torch.ones(3, device="cuda")
        y = x * 2
        assert not gpu.syncs
        wait(y)
    assert sum(gpu.syncs.values()) == 1


def test_memory_is_counted_and_limited(shadow_gpu):
    with shadow_gpu(memory=1000) as gpu:
        x = torch.zeros(100, device="cuda")
        assert gpu.live == [400]
        y = x.view(10, 10)
        del x
        assert gpu.live == [400], "a view holds the memory"
        with pytest.raises(torch.OutOfMemoryError, match="400 bytes are in use"):
            torch.zeros(200, device="cuda")
        del y
        assert gpu.live == [0]
        assert gpu.peak_bytes == 400
        assert torch.cuda.mem_get_info() == (1000, 1000)


def _staged(shadow_gpu, fault):
    """Two matrices through one pinned buffer, on a copy stream and a compute stream."""
    with shadow_gpu():
        copy, compute = torch.cuda.Stream(), torch.cuda.Stream()
        host = torch.empty(64, 64, pin_memory=True)
        back = [torch.empty(64, 64, pin_memory=True) for _ in range(2)]
        free, ready = None, []
        for i in range(2):
            if free is not None and fault != "reuse":
                free.synchronize()
            host.copy_(torch.full((64, 64), float(i + 1)))
            with torch.cuda.stream(copy):
                x = torch.empty(64, 64, device="cuda")
                x.copy_(host, non_blocking=True)
                free = torch.cuda.Event()
                free.record()
            with torch.cuda.stream(compute):
                if fault != "wait":
                    compute.wait_event(free)
                if fault != "free":
                    x.record_stream(compute)
                y = x @ x
                del x
                back[i].copy_(y, non_blocking=True)
                ready.append(torch.cuda.Event())
                ready[-1].record()
        if fault != "early":
            for event in ready:
                event.synchronize()
        return [float(part[0, 0]) for part in back]


def test_streams_that_wait_pass(shadow_gpu):
    assert _staged(shadow_gpu, None) == [64.0, 256.0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reuse", "staging buffer was overwritten"),
        ("wait", "without waiting"),
        ("free", "without record_stream"),
    ],
)
def test_streams_that_do_not_wait_are_caught(shadow_gpu, fault, message):
    with pytest.raises(RaceError, match=message):
        _staged(shadow_gpu, fault)


def test_host_memory_is_poisoned_until_its_copy_was_waited_for(shadow_gpu):
    assert all(value != value for value in _staged(shadow_gpu, "early"))  # 0xFFFFFFFF is NaN


def test_overwriting_what_another_stream_reads_is_caught(shadow_gpu):
    with shadow_gpu():
        other = torch.cuda.Stream()
        x = torch.ones(4, device="cuda")
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            x.record_stream(other)
            y = x + 1
        with pytest.raises(RaceError, match="overwrites"):
            x.zero_()
        torch.cuda.current_stream().wait_stream(other)
        x.zero_()
        del y


def test_threads_take_part(shadow_gpu):
    found = []
    with shadow_gpu(devices=2, schedule=1) as gpu:

        def work():
            torch.cuda.set_device(1)
            found.append(torch.ones(4, device="cuda").sum())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found[0].device == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 0
    assert [launch.device for launch in gpu.launches if launch.op == "sum"] == [1]


def test_factorisations_are_seen(shadow_gpu):
    with shadow_gpu() as gpu:
        torch.linalg.qr(torch.randn(9, 6, device="cuda"))
        assert gpu.largest_factorisation == 6
        torch.linalg.svd(torch.randn(3, 12, 7, device="cuda"))
    assert gpu.largest_factorisation == 7
    assert gpu.solver_waits == 1, "a QR needs no check"


def test_ops_run_their_torch_implementation(shadow_gpu):
    from dirmerge import ops

    x = torch.randn(6, 4)
    with shadow_gpu() as gpu:
        found = ops.gram(x.to("cuda")).cpu()
    torch.testing.assert_close(found, x.mT @ x)
    assert any(launch.flops for launch in gpu.launches)


def test_bytes_are_those_read_and_written(shadow_gpu):
    with shadow_gpu() as gpu:
        x = torch.empty(6, 4, device="cuda")
        x.zero_()
        x.add_(torch.ones_like(x))
        x.double()
        torch.mm(x.mT, x, out=torch.empty(4, 4, device="cuda"))
    found = [(launch.op, launch.nbytes) for launch in gpu.launches]
    assert found == [
        ("empty", 0),
        ("zero_", 96),
        ("ones_like", 96),
        ("add_", 3 * 96),
        ("copy_", 96 + 192),
        ("empty", 0),
        ("mm", 2 * 96 + 64),
    ]


def test_a_product_in_place_has_flops(shadow_gpu):
    with shadow_gpu() as gpu:
        a, b = torch.ones(6, 4, device="cuda"), torch.ones(4, 5, device="cuda")
        torch.ones(6, 5, device="cuda").addmm_(a, b)
    assert gpu.launches[-1].flops == 2 * 6 * 4 * 5


class TestWithoutValues:
    def test_nothing_is_computed_and_all_is_noted(self, shadow_gpu):
        with shadow_gpu(memory=3 << 40, values=False) as gpu:
            x = torch.zeros(1 << 20, 1 << 20, device="cuda", dtype=torch.bfloat16)  # 2 TB
            del x
        assert [launch.shapes for launch in gpu.launches] == [((1 << 20, 1 << 20),)]

    def test_what_is_read(self, shadow_gpu):
        with shadow_gpu(values=False) as gpu:
            x = torch.zeros(3).to("cuda")
            assert float(x.sum()) == 1.0
            assert bool((x < 0).all())
            assert int(x.count_nonzero()) == 0
            assert torch.equal(x.cpu(), torch.ones(3))
            assert torch.equal(x[:2].to("cpu", torch.float64), torch.ones(2, dtype=torch.float64))
            buffer = torch.empty(3, pin_memory=True)
            buffer.copy_(x, non_blocking=True)
            assert not torch.equal(buffer, torch.ones(3)), "it has not arrived"
            torch.cuda.synchronize()
            assert torch.equal(buffer, torch.ones(3))
        assert sum(gpu.syncs.values()) == 7

    def test_views_share_memory(self, shadow_gpu):
        with shadow_gpu(values=False) as gpu:
            x = torch.ones(6, 4, device="cuda")
            x[2:, 1].add_(1)
            x.mT.reshape(-1)
        assert gpu.peak_bytes == 2 * 96
        assert [launch.op for launch in gpu.launches] == ["ones", "add_", "clone"]

    def test_an_op_is_one_launch_where_it_has_a_kernel(self, shadow_gpu):
        from dirmerge import ops

        with shadow_gpu(values=False) as gpu:
            assert ops.gram(torch.ones(8, 5, device="cuda")).shape == (5, 5)
            assert ops.gram(torch.ones(8, 5, device="cuda", dtype=torch.float64)).shape == (5, 5)
        assert [launch.op for launch in gpu.launches] == ["ones", "gram", "ones", "mm"]


def test_nothing_stays_behind(shadow_gpu):
    with ExitStack() as stack:
        before = [torch.cuda.is_available, torch.cuda.stream, threading.Thread.run]
        stack.enter_context(shadow_gpu())
        assert torch.cuda.is_available()
    assert before == [torch.cuda.is_available, torch.cuda.stream, threading.Thread.run]
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("kind", ["full", "adapters"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_gives_the_result_of_the_cpu(shadow_gpu, method, kind):
    base = torch.randn(48, 32)
    parts = [0.1 * torch.randn(48, 4) for _ in range(3)], [0.1 * torch.randn(32, 4) for _ in range(3)]

    def deltas(device):
        here = base.to(device)
        if kind == "full":
            return [
                dirmerge.Difference((base + a @ b.mT).to(device), here) for a, b in zip(*parts, strict=True)
            ]
        return [dirmerge.LowRank(a.to(device), None, b.to(device)) for a, b in zip(*parts, strict=True)]

    expected = dirmerge.merge_deltas(deltas("cpu"), method).dense()
    with shadow_gpu():
        found = dirmerge.merge_deltas(deltas("cuda"), method).dense()
        assert found.is_cuda
        found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
