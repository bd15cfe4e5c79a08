"""Starts processes that work together over gloo. A hang ends as a failure, and so does an error in any of them."""

from __future__ import annotations

import datetime
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Longer than any test takes here, and short enough that a hang is seen.
_TIMEOUT = 120


def run(world: int, work: Callable[..., Any], *arguments: Any, timeout: float = _TIMEOUT) -> list[Any]:
    """Return what a function returns in each of several processes.

    Args:
        world: number of processes.
        work: a function of a module, called as work(*arguments) in each process after the process group has been made.
        arguments: what can be pickled.
        timeout: seconds after which processes that have not ended are a failure.

    Raises:
        RuntimeError: the function failed in some process, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        results: Any = context.SimpleQueue()
        started = [
            context.Process(target=_work, args=(rank, world, f"{folder}/store", results, work, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in started:
            process.start()
        done: dict[int, Any] = {}
        end = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        while len(done) < world and any(process.is_alive() for process in started):
            if results.empty():
                started[0].join(0.02)
                if datetime.datetime.now() > end:
                    break
                continue
            rank, error, value = results.get()
            if error:
                _stop(started)
                raise RuntimeError(f"process {rank}:\n{error}")
            done[rank] = value
        while not results.empty():
            rank, error, value = results.get()
            done[rank] = value
            if error:
                raise RuntimeError(f"process {rank}:\n{error}")
        _stop(started)
        if len(done) < world:
            raise RuntimeError(f"processes {sorted(set(range(world)) - set(done))} of {world} have not ended in time.")
        return [done[rank] for rank in range(world)]


def _stop(started: list[Any]) -> None:
    for process in started:
        process.join(1)
        if process.is_alive():
            process.kill()


def _work(rank: int, world: int, store: str, results: Any, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=_TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    try:
        results.put((rank, "", work(*arguments)))
    except Exception:
        results.put((rank, traceback.format_exc(), None))
    finally:
        dist.destroy_process_group()
