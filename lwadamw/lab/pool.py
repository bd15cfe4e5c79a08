"""Work in several processes. The processes end when their parent ends, also if the parent is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

Task = TypeVar("Task")
Work = Callable[[Any, torch.device, Callable[[], None]], Any]


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
        self.process.start()
        theirs.close()
        self.index: int | None = None

    def give(self, index: int, task: Any) -> None:
        self.index = index
        self.connection.send(task)


def run_all(
    work: Work, tasks: Sequence[Task], device: torch.device, jobs: int, threads: int
) -> Iterator[tuple[Task, Any]]:
    """Run `work(task, device, alive)` for every task, several at once.

    Tasks start in the order given. If a task raises an exception or its process ends, the task gives a `Failure`, and the
    other tasks go on. Ending the iteration early ends the processes.

    Args:
        work: a function that can be imported by name. It has to call `alive()` now and then. The call ends the process if
            the parent process is gone, whether it ended or was killed.
        tasks: the tasks. They are pickled.
        device: passed to `work`.
        jobs: number of processes.
        threads: number of torch threads in each process.

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
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = work(task, device, _end_with_parent)
        except Exception:
            result = Failure(traceback.format_exc())
        try:
            connection.send(result)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.stderr.close()
        os._exit(1)
