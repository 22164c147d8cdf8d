"""The memory that jobs pass to each other."""

from __future__ import annotations

from dirmerge.engine.items import _Buffers

MB = 1 << 20


def test_buffers_are_used_again_up_to_a_total():
    pool = _Buffers(20 * MB)
    with pool.borrow([8 * MB, 8 * MB, 8 * MB]) as buffers:
        first = [buffer.data_ptr() for buffer in buffers]
    with pool.borrow([8 * MB, 6 * MB]) as buffers:
        assert {buffer.data_ptr() for buffer in buffers} == set(first[:2])  # the third was beyond the total
        assert all(buffer.numel() == 8 * MB for buffer in buffers)


def test_large_buffers_and_small_ones_do_not_add_up():
    pool = _Buffers(100 * MB)
    with pool.borrow([8 * MB]):
        pass
    with pool.borrow([64 * MB]) as large:
        place = large[0].data_ptr()
        assert not pool._free, "what the small ones left came on top"
    with pool.borrow([64 * MB]) as large:
        assert large[0].data_ptr() == place
    with pool.borrow([8 * MB]):
        assert not pool._free, "what the large ones left came on top"


def test_buffers_come_back_after_an_error():
    pool = _Buffers(100 * MB)
    try:
        with pool.borrow([MB]):
            raise RuntimeError
    except RuntimeError:
        assert len(pool._free) == 1
