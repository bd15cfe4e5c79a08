"""Sweep: many runs, several at once, into one CSV file that says which of them there are already."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, Protocol

import torch

import lwadamw

from .pool import Failure, Work, run_all
from .table import Row, RunTable

# Where the runs were made. Not part of what identifies a run.
PLACE: Final = ("seconds", "device", "torch", "version", "started")
# What a process of its own takes of a GPU's memory before the first tensor, and how much of the memory is given to runs.
CONTEXT_BYTES: Final = 700 * 2**20
MEMORY_SHARE: Final = 0.8


class Task(Protocol):
    """The full setting of one run: a frozen dataclass whose fields are the columns that identify it."""

    def shared(self) -> Any:
        """Equal for tasks that are the same computation under different names."""

    @property
    def cost(self) -> float:
        """In proportion to the time it takes."""

    @property
    def memory(self) -> int:
        """Bytes it needs on a GPU."""


def sweep(
    tasks: Iterable[Any],
    work: Work,
    result: Sequence[str],
    path: Path,
    device: torch.device,
    *,
    jobs: int | None = None,
    show: Callable[[str], None] = print,
) -> list[Failure]:
    """Run every task that the file does not have yet, and append each as soon as it has ended.

    Args:
        tasks: in the order in which they are begun; see `Task`.
        work: see `pool.run_all`; returns the columns in `result`, or a list of such rows.
        result: columns that say what came of a run.
        path: the CSV file. Killed at any moment, it has all runs that had ended, and another call goes on from there.
        jobs: how many at once; by default one per core, and on a GPU as many as fit in its memory.
        show: is given a line at every end of a run.

    Returns:
        What failed by an error or the end of its process, and so is not in the file.

    Raises:
        ValueError: the file is another sweep's, or another process writes to it.
    """
    computations: dict[Any, list[Any]] = {}
    tasks = list(tasks)
    columns = [field.name for field in fields(tasks[0])]
    with RunTable(path, columns, (*result, *PLACE)) as table:
        for task in dict.fromkeys(tasks):
            if table.key(asdict(task)) not in table.done:
                computations.setdefault(task.shared(), []).append(task)
        todo = [members[0] for members in computations.values()]
        cores = os.cpu_count() or 1
        jobs = jobs or (cores if device.type == "cpu" else min(cores, _fitting(todo, device)))
        jobs = max(1, min(jobs, len(todo)))
        there = len(table.done)
        show(f"{path}: {there} runs there, {len(todo)} to make, {jobs} at once on {device}")
        failures: list[Failure] = []
        place = _place(device)
        start, total, spent = time.time(), sum(task.cost for task in todo), 0.0
        outcomes = run_all(work, todo, device, jobs, threads=max(1, cores // jobs))
        for ended, (task, outcome) in enumerate(outcomes, 1):
            spent += task.cost
            left = (time.time() - start) * (total - spent) / spent
            rate = f"{ended}/{len(todo)}  {_duration(left)} left"
            if isinstance(outcome, Failure):
                failures.append(outcome)
                show(f"{rate}  FAILED {_label(task)}\n{outcome.text}")
                continue
            members = computations[task.shared()]
            rows = outcome if isinstance(outcome, list) else [outcome]
            table.append([{**asdict(member), **row, **place} for member in members for row in rows])
            show(f"{rate}  {_label(task)}  {_outcome(rows[-1])}")
    return failures


def _fitting(tasks: Sequence[Any], device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    largest = max((task.memory for task in tasks), default=0) + CONTEXT_BYTES
    return max(1, int(MEMORY_SHARE * free / largest))


def _place(device: torch.device) -> Row:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "torch": torch.__version__, "version": _version(), "started": time.strftime("%Y-%m-%d")}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version() -> str:
    """Of the package; with the commit where it is a checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=10", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return lwadamw.__version__
    return f"{lwadamw.__version__}+{commit}"


def _label(task: Any) -> str:
    names = ("arm", "variant", "width", "lr", "weight_decay", "seed")
    values = [f"{name} {getattr(task, name):g}" for name in names[2:] if hasattr(task, name)]
    return "  ".join([str(getattr(task, name)) for name in names[:2] if hasattr(task, name)] + values)


def _outcome(outcome: Row) -> str:
    shown = {name: outcome[name] for name in ("status", "loss", "gain_network") if name in outcome}
    return "  ".join(f"{name} {value:.4f}" if isinstance(value, float) else str(value) for name, value in shown.items())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
