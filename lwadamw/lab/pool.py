"""Work in several processes. The processes end when their parent ends, also if the parent is killed."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Protocol, TypeVar

import torch

Task = TypeVar("Task")
SECONDS_BETWEEN: Final = 0.5  # between two messages of a process about its progress


class Alive(Protocol):
    """What a run calls now and then. The call ends the process if the parent process is gone."""

    def __call__(self, step: int = 0, steps: int = 0, loss: float = math.nan) -> None:
        """Say how far the run is.

        Args:
            step: number of steps taken.
            steps: length of the run in steps. 0: how far the run is is not told.
            loss: loss at this step. NaN: the run has none.
        """


Work = Callable[[Any, torch.device, Alive], Any]


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is.

    Args:
        step: number of steps taken.
        steps: length of the run in steps.
        loss: loss at this step. NaN: the run has none.
    """

    step: int
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that failed.

    Args:
        text: the traceback of the exception, or how the process ended.
    """

    text: str


class _Worker:
    def __init__(self, work: Work, device: torch.device, threads: int) -> None:
        # Neither CUDA nor torch's threads work in a forked process, so every process is started afresh.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, device, threads, theirs), daemon=True)
        with _no_interrupts():
            self.process.start()
        theirs.close()
        self.index: int | None = None

    def give(self, index: int, task: Any) -> None:
        self.index = index
        self.connection.send(task)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C from the first moment: it would end them with a traceback while they import torch."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # The tracker, when it is started, unblocks the signal that is blocked here. So it has to be there before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _nobody(_task: Any, _step: Step) -> None:
    pass


def run_all(
    work: Work,
    tasks: Sequence[Task],
    device: torch.device,
    jobs: int,
    threads: int,
    seen: Callable[[Task, Step], None] = _nobody,
) -> Iterator[tuple[Task, Any]]:
    """Run `work(task, device, alive)` for every task, several at once.

    Tasks start in the order given. If a task raises an exception or its process ends, the task gives a `Failure`, and the
    other tasks go on. Ending the iteration early ends the processes.

    Args:
        work: a function that can be imported by name. It has to call `alive` now and then; see `Alive`.
        tasks: the tasks. They are pickled.
        device: passed to `work`.
        jobs: number of processes.
        threads: number of torch threads in each process.
        seen: called with a task and how far its run is, at most twice a second for each run.

    Yields:
        A task and the result of `work`, or a `Failure`. The tasks come in the order in which they end.
    """
    waiting = list(enumerate(tasks))[::-1]
    workers = [_Worker(work, device, threads) for _ in range(min(jobs, len(tasks)))]
    try:
        for worker in workers:
            worker.give(*waiting.pop())
        while busy := [w for w in workers if w.index is not None]:
            ready = {*wait([w.connection for w in busy] + [w.process.sentinel for w in busy])}
            for i, worker in enumerate(workers):
                if worker.index is None or not ready & {worker.connection, worker.process.sentinel}:
                    continue
                index = worker.index
                try:
                    result = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    result = Failure(f"its process ended with exit code {worker.process.exitcode}")
                    worker.connection.close()
                    if waiting:
                        worker = workers[i] = _Worker(work, device, threads)
                if isinstance(result, Step):
                    seen(tasks[index], result)
                    continue
                worker.index = None
                if waiting:
                    worker.give(*waiting.pop())
                yield tasks[index], result
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _serve(work: Work, device: torch.device, threads: int, connection: Connection[Any, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C and then ends this process.
    torch.set_num_threads(threads)
    alive = _Reporter(connection)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = work(task, device, alive)
        except Exception:
            result = Failure(traceback.format_exc())
        try:
            connection.send(result)
        except BrokenPipeError:
            return


class _Reporter:
    """The `Alive` of a process. It sends how far the run is, but not too often."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._next = 0.0

    def __call__(self, step: int = 0, steps: int = 0, loss: float = math.nan) -> None:
        _end_with_parent()
        now = time.monotonic()
        if steps and now >= self._next:
            self._next = now + SECONDS_BETWEEN
            self._connection.send(Step(step, steps, loss))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.stderr.close()
        os._exit(1)
