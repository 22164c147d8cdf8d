"""The workers of a merge: threads that read ahead, make rows and write, within a budget of bytes."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch

from dirmerge.checkpoints.hashing import InterruptedMergeError


class Job:
    """Something for a worker to do.

    Attributes:
        run: does it.
        nbytes: what it holds in memory while it runs, and until `release` if `kept`.
        group: of which it is a part; None for none.
        kept: whether its result is still needed after it has run.
        result: what `run` returned.
    """

    __slots__ = ("done", "group", "kept", "nbytes", "order", "result", "run", "started")

    def __init__(
        self, run: Callable[[], Any], nbytes: int, group: Group | None = None, *, kept: bool = False
    ) -> None:
        self.run = run
        self.nbytes = nbytes
        self.group = group
        self.kept = kept
        self.result: Any = None
        self.started = self.done = False
        self.order = -1


class Group:
    """Jobs that are waited for together.

    Attributes:
        left: how many of them have not ended.
        seconds: time that the ended ones took.
    """

    def __init__(self, count: int) -> None:
        self.left = count
        self.seconds = 0.0


class Workers:
    """Threads that do the jobs of a merge.

    Jobs that are fed begin in their order, each as soon as it fits into the budget together with those
    that run or whose results are kept; the next one always begins when nothing else holds memory. Jobs
    that are submitted, the results of the computing thread, go first. An error in any job stops all, and is
    raised wherever the caller waits.

    Args:
        count: number of threads; each computes with one thread of its own.
        budget: bytes that fed jobs may hold.
        backlog: bytes that submitted jobs may hold before `submit` waits.
    """

    def __init__(self, count: int, budget: int, backlog: int) -> None:
        self.count = count
        self.budget = budget
        self.backlog = backlog
        self._fed: Iterator[Job] = iter(())
        self._next: Job | None = None
        self._urgent: deque[Job] = deque()
        self._held = self._behind = self._running = 0
        self._stopped = self._closed = False
        self._error: tuple[int, BaseException] | None = None
        self._order = itertools.count()
        self._change = threading.Condition()
        self._on_stop: list[Callable[[], None]] = []
        self._ready = threading.Barrier(count + 1)
        self._threads = [
            threading.Thread(target=self._work, name=f"dirmerge-worker-{i}", daemon=True)
            for i in range(count)
        ]

    def __enter__(self) -> Workers:
        threads = torch.get_num_threads()
        try:
            for thread in self._threads:
                thread.start()
            self._ready.wait()
        except BaseException:  # interrupted: those that have begun must not wait for the others
            self._ready.abort()
            self.__exit__(*sys.exc_info())
            raise
        finally:
            # What a worker sets for itself also becomes the default of threads that begin later.
            torch.set_num_threads(threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._closed = True
            if kind is not None:
                self._stop()
            self._change.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def on_stop(self, action: Callable[[], None]) -> None:
        """Calls an action when an error stops the workers: it must wake what waits inside jobs."""
        self._on_stop.append(action)

    def feed(self, jobs: Iterator[Job]) -> None:
        """Takes the jobs that follow those fed before; they are made one by one, when there is room."""
        with self._change:
            self._fed = itertools.chain(self._fed, jobs)
            self._change.notify_all()

    def submit(self, job: Job) -> None:
        """Takes a job that goes before the fed ones; waits while too many bytes of such jobs do."""
        with self._change:
            while not self._stopped and self._behind and self._behind + job.nbytes > self.backlog:
                self._change.wait()
            self._check()
            job.order = next(self._order)
            self._behind += job.nbytes
            self._urgent.append(job)
            self._change.notify_all()

    def result(self, job: Job) -> Any:
        """Waits for a fed job and returns its result."""
        with self._change:
            while not job.done and not self._stopped:
                self._change.wait()
            self._check()
            return job.result

    def release(self, job: Job) -> None:
        """Lets go of the result of a fed job that was kept; its bytes are the caller's from now on."""
        with self._change:
            if job.kept:
                job.kept = False
                if job.done:
                    job.result = None
                    self._held -= job.nbytes
                    self._change.notify_all()

    def wait(self, group: Group) -> None:
        """Waits until all jobs of a group have ended."""
        with self._change:
            while group.left and not self._stopped:
                self._change.wait()
            self._check()

    def drain(self) -> None:
        """Waits until every job that was fed or submitted has ended."""
        with self._change:
            while not self._stopped and (self._peek() is not None or self._urgent or self._running):
                self._change.wait()
            self._check()

    def fail(self, error: BaseException) -> None:
        """Stops all for an error outside the jobs."""
        with self._change:
            self._fail(-1, error)

    def check(self) -> None:
        """Raises the error that has stopped the workers, if one has."""
        with self._change:
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error[1]
        if self._stopped:
            raise InterruptedMergeError

    def _stop(self) -> None:
        self._stopped = True
        for action in self._on_stop:
            action()
        self._change.notify_all()

    def _peek(self) -> Job | None:
        """Returns the next fed job, made when it is first looked at."""
        if self._next is None:
            self._next = next(self._fed, None)
            if self._next is not None:
                self._next.order = next(self._order)
        return self._next

    def _begin(self) -> tuple[Job, bool] | None:
        """Returns a job to do and whether it was fed, None when there is none to come."""
        with self._change:
            while True:
                if self._stopped:
                    return None
                if self._urgent:
                    job, fed = self._urgent.popleft(), False
                    break
                try:
                    ahead = self._peek()
                except BaseException as error:
                    self._fail(0, error)
                    return None
                if ahead is not None and (not self._held or self._held + ahead.nbytes <= self.budget):
                    job, fed = ahead, True
                    self._next = None
                    self._held += job.nbytes
                    break
                if self._closed and ahead is None:
                    return None
                self._change.wait()
            job.started = True
            self._running += 1
            return job, fed

    def _work(self) -> None:
        torch.get_num_threads()  # the first call in a thread takes the default over
        torch.set_num_threads(1)
        try:
            self._ready.wait()
        except threading.BrokenBarrierError:
            return
        while (begun := self._begin()) is not None:
            job, fed = begun
            before = time.perf_counter()
            try:
                result = job.run()
            except BaseException as error:
                with self._change:
                    self._running -= 1
                    self._fail(job.order, error)
                return
            with self._change:
                self._running -= 1
                job.done = True
                if fed and job.kept:
                    job.result = result
                elif fed:
                    self._held -= job.nbytes
                else:
                    self._behind -= job.nbytes
                if job.group is not None:
                    job.group.left -= 1
                    job.group.seconds += time.perf_counter() - before
                self._change.notify_all()
            del job, begun, result

    def _fail(self, order: int, error: BaseException) -> None:
        """Notes an error, of several the one of the earliest job, and stops all."""
        if not isinstance(error, InterruptedMergeError) and (self._error is None or order < self._error[0]):
            self._error = order, error
        self._stop()
