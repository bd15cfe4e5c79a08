"""Sweep: many runs, several at once, into one CSV file. The file also shows which runs are already done."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, Protocol

import torch

import lwadamw

from .pool import Failure, Work, run_all
from .progress import Progress
from .table import Row, RunTable

# Columns that say where and when a run was made. They do not identify the run.
PLACE: Final = ("seconds", "device", "torch", "version", "started")
CONTEXT_BYTES: Final = 700 * 2**20  # GPU memory that a process takes before its first tensor
MEMORY_SHARE: Final = 0.8  # share of the free GPU memory that the runs may use together


class Task(Protocol):
    """The full setting of one run: a frozen dataclass whose fields are the columns that identify the run."""

    def shared(self) -> Any:
        """Return a value that is equal for tasks which are the same computation under different names."""

    @property
    def cost(self) -> float:
        """A number proportional to the time of the run."""

    @property
    def memory(self) -> int:
        """Memory of a GPU that the run needs, in bytes."""


def sweep(
    tasks: Iterable[Any],
    work: Work,
    result: Sequence[str],
    path: Path,
    device: torch.device,
    *,
    jobs: int | None = None,
    show: Callable[[str], None] = print,
    live: bool = False,
) -> list[Failure]:
    """Run every task that is not in the file yet, and append its result as soon as the run has ended.

    The sweep may be killed at any moment. The file then holds all runs that had ended, and the next call does the rest.

    Args:
        tasks: at least one task, in the order in which they start; see `Task`.
        work: makes one run; see `pool.run_all`. It returns a row with the columns in `result`, or a list of such rows.
        result: names of the columns that hold the result of a run.
        path: path of the CSV file.
        device: passed to `work`.
        jobs: number of runs at once. By default one per core; on a GPU, as many as fit in its memory.
        show: called with a line of text at the start, at the end of every run, and now and then while no run ends.
        live: whether the standard output is a terminal, on which lines can change in place; see `Progress`.

    Returns:
        The runs that failed, by an exception or by the end of their process. They are not in the file.

    Raises:
        ValueError: the file belongs to another sweep, or another process writes to it.
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
        with Progress(show, {task: task.cost for task in todo}, _label, live) as progress:
            outcomes = run_all(work, todo, device, jobs, threads=max(1, cores // jobs), seen=progress.step)
            for task, outcome in outcomes:
                progress.ended(task)
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                    progress.line(f"{progress.rate()}  FAILED {_label(task)}\n{outcome.text}")
                    continue
                members = computations[task.shared()]
                rows = outcome if isinstance(outcome, list) else [outcome]
                table.append([{**asdict(member), **row, **place} for member in members for row in rows])
                progress.line(f"{progress.rate()}  {_label(task)}  {_outcome(rows[-1])}")
    return failures


def output() -> dict[str, Any]:
    """Return the arguments of `sweep` that write to the standard output."""
    return {"show": lambda line: print(line, flush=True), "live": sys.stdout.isatty()}


def _fitting(tasks: Sequence[Any], device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    largest = max((task.memory for task in tasks), default=0) + CONTEXT_BYTES
    return max(1, int(MEMORY_SHARE * free / largest))


def _place(device: torch.device) -> Row:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "torch": torch.__version__, "version": _version(), "started": time.strftime("%Y-%m-%d")}


def cpu_name() -> str:
    """Return the model name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version() -> str:
    """Return the version of the package, with the commit if the package is a git checkout."""
    checkout = Path(__file__).resolve().parents[2]
    # Any repository may be around an installed package, for example that of a project which keeps its environment in .venv.
    if not (checkout / ".git").exists():
        return lwadamw.__version__
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=10", "--dirty"]
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
