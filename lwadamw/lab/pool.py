"""Work in several processes that end with their parent, whatever ends it."""

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
    """What went wrong with a task: a traceback, or how its process ended."""

    text: str


class _Worker:
    def __init__(self, work: Work, device: torch.device, threads: int) -> None:
        # Not fork: CUDA does not survive it, and neither do torch's threads.
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
    """Every task with what `work(task, device, alive)` made of it, in the order in which they end.

    Tasks are begun in order. An exception, or the end of a process, is that task's `Failure`, and the others go on.
    Ending the iteration early ends the processes.

    Args:
        work: a function that can be imported. It is to call `alive()` now and then, which ends the process if the one
            that started it is gone, killed too.
        jobs: how many processes.
        threads: of torch in each of them.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to deal with
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
