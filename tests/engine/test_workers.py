"""The workers of a merge: order, budgets, errors, and what is left of a process's settings."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from dirmerge.checkpoints.hashing import InterruptedMergeError
from dirmerge.engine.workers import Group, Job, Workers


class Tracker:
    """Jobs that note how many bytes run at the same time."""

    def __init__(self):
        self.lock = threading.Lock()
        self.held = self.most = 0
        self.ended = []

    def job(self, number, nbytes, group=None, *, kept=False, pause=0.001):
        def run():
            with self.lock:
                self.held += nbytes
                self.most = max(self.most, self.held)
            time.sleep(pause)
            with self.lock:
                self.held -= nbytes
                self.ended.append(number)
            return number

        return Job(run, nbytes, group, kept=kept)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("budget", [1, 25, 1000])
def test_everything_is_done_within_the_budget(count, budget):
    tracker, group = Tracker(), Group(50)
    with Workers(count, budget, 100) as workers:
        workers.feed(tracker.job(i, 10, group) for i in range(50))
        workers.wait(group)
        assert sorted(tracker.ended) == list(range(50))
        workers.drain()
    assert tracker.most <= max(budget, 10)  # the next one always begins when nothing else holds memory
    assert group.seconds >= 50 * 0.001


def test_kept_results_hold_their_bytes_until_they_are_released():
    tracker = Tracker()
    jobs = [tracker.job(i, 10, kept=True) for i in range(4)]
    with Workers(2, 20, 100) as workers:
        workers.feed(iter(jobs))
        assert workers.result(jobs[0]) == 0
        assert workers.result(jobs[1]) == 1
        time.sleep(0.05)
        assert not jobs[2].started, "there is no room for it"
        workers.release(jobs[0])
        assert workers.result(jobs[2]) == 2
        for job in jobs:
            workers.release(job)
        workers.drain()
    assert tracker.ended[-1] == 3
    assert [job.result for job in jobs] == [None] * 4


def test_jobs_are_made_when_there_is_room_for_them():
    made = []

    def jobs():
        for i in range(100):
            made.append(i)
            yield Job(lambda: None, 10, kept=True)

    with Workers(2, 30, 100) as workers:
        workers.feed(jobs())
        time.sleep(0.05)
        assert len(made) <= 4  # three that fit, and the next
        workers.fail(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            workers.check()


def test_submitted_jobs_go_first_and_wait_for_room():
    tracker, gate = Tracker(), threading.Event()
    with Workers(1, 1000, 20) as workers:
        workers.submit(Job(gate.wait, 10))
        workers.feed(tracker.job(f"fed {i}", 1) for i in range(3))
        workers.submit(tracker.job("submitted", 10))
        late = threading.Thread(target=lambda: workers.submit(tracker.job("late", 10)))
        late.start()
        late.join(0.05)
        assert late.is_alive(), "20 bytes wait already"
        gate.set()
        late.join(10)
        workers.drain()
    assert tracker.ended[0] == "submitted"
    assert sorted(tracker.ended) == ["fed 0", "fed 1", "fed 2", "late", "submitted"]


def test_an_error_stops_all_and_is_raised_where_the_caller_waits():
    stopped, group = [], Group(20)

    def fail():
        raise ValueError("the disk is gone")

    tracker = Tracker()
    jobs = [Job(fail, 1, group) if i == 3 else tracker.job(i, 1, group) for i in range(20)]
    workers = Workers(2, 2, 10)
    workers.on_stop(lambda: stopped.append(True))
    with workers:
        workers.feed(iter(jobs))
        with pytest.raises(ValueError, match="the disk is gone"):
            workers.wait(group)
    assert stopped
    assert len(tracker.ended) < 19
    with pytest.raises(ValueError, match="the disk is gone"):
        workers.submit(Job(lambda: None, 1))


def test_of_several_errors_the_earliest_job_is_blamed():
    barrier = threading.Barrier(2)

    def fail(text, wait):
        barrier.wait()
        time.sleep(wait)
        raise ValueError(text)

    with Workers(2, 10, 10) as workers:
        workers.feed(iter([Job(lambda: fail("first", 0.05), 1), Job(lambda: fail("second", 0), 1)]))
        time.sleep(0.2)
        with pytest.raises(ValueError, match="first"):
            workers.drain()


def test_leaving_with_an_error_does_not_wait_for_what_is_left():
    tracker = Tracker()
    begun = time.perf_counter()
    with contextlib.suppress(KeyboardInterrupt), Workers(2, 10, 10) as workers:
        workers.feed(tracker.job(i, 1, pause=0.02) for i in range(10_000))
        raise KeyboardInterrupt
    assert time.perf_counter() - begun < 5
    with pytest.raises(InterruptedMergeError):
        workers.check()


def test_an_interrupt_while_the_threads_begin_ends_them(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    workers = Workers(3, 10, 10)
    monkeypatch.setattr(workers._threads[2], "start", interrupt)
    with pytest.raises(KeyboardInterrupt), workers:
        pass
    assert not any(thread.is_alive() for thread in workers._threads)


def test_the_number_of_threads_of_the_process_stays():
    before = torch.get_num_threads()
    seen = []
    with Workers(3, 100, 100) as workers:
        workers.feed(Job(lambda: seen.append(torch.get_num_threads()), 1) for _ in range(6))
        workers.drain()
        assert torch.get_num_threads() == before
    assert set(seen) == {1}
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before]
