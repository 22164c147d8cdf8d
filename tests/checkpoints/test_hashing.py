"""Hashes of files whose pieces are read by several threads."""

import hashlib
import itertools
import random
import threading

import pytest
from blake3 import blake3

from dirmerge.checkpoints.hashing import InterruptedMergeError, PassingHash, hash_file
from dirmerge.errors import CheckpointError


@pytest.mark.parametrize("size", [0, 1, 1000, (8 << 20) + 13])
def test_hash_file(tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "x").write_bytes(data)
    assert hash_file(tmp_path / "x") == blake3(data).hexdigest()
    assert hash_file(tmp_path / "x", "sha256") == hashlib.sha256(data).hexdigest()


def test_hash_of_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        hash_file(tmp_path / "missing")


@pytest.mark.parametrize("seed", range(8))
def test_spans_in_any_order_from_several_threads(tmp_path, seed):
    """Whatever is claimed in whatever order, with gaps and twice, every byte is hashed once, in order."""
    draw = random.Random(seed)
    data = draw.randbytes(5000)
    path = tmp_path / "x"
    path.write_bytes(data)
    edges = sorted({0, len(data), *(draw.randrange(len(data)) for _ in range(20))})
    spans = list(itertools.pairwise(edges))
    if seed % 2:
        draw.shuffle(spans)
    spans = [span for span in spans if draw.random() < 0.7] + spans[:2]
    passing = PassingHash(path, len(data))
    claimed = [(passing.claim(begin, end), begin, end) for begin, end in spans]
    claimed.append((passing.claim(len(data), len(data)), len(data), len(data)))

    def read(first, begin, end):
        if first < begin:
            passing.feed_range(first, begin, None)
        if max(first, begin) < end:
            passing.feed(max(first, begin), memoryview(data)[max(first, begin) : end])

    threads = [threading.Thread(target=read, args=claim) for claim in claimed]
    draw.shuffle(threads)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert passing.hexdigest() == blake3(data).hexdigest()


def test_stop_wakes_those_who_wait(tmp_path):
    passing = PassingHash(tmp_path / "x", 100)
    passing.claim(0, 50)
    passing.claim(50, 100)
    seen = []

    def wait():
        try:
            passing.feed(50, memoryview(bytes(50)))
        except InterruptedMergeError as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    passing.stop()
    thread.join(10)
    assert len(seen) == 1
