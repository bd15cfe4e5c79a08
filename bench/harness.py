"""What the benchmark commands share: the machine's description, a timer, quantiles, JSON, tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, else a GPU, else the CPU. Without a GPU, kernels are set up to run interpreted."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here: --device cpu measures what can be measured without.")
    if device.type == "cpu":
        # Triton reads this once, as the kernels are first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return device


def output(*command: str) -> str | None:
    """What a command prints, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """LWADAMW_COMMIT, for a copy without a repository; else git's, with "+dirty" if tracked files differ from it."""
    given = os.environ.get("LWADAMW_COMMIT")
    if given:
        return given
    head = output("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+dirty" if output("git", "status", "--porcelain", "--untracked-files=no") else "")


def version_of(module: str) -> str:
    return importlib.import_module(module).__version__ if importlib.util.find_spec(module) else "none"


def machine(device: torch.device, threads: int | None = None) -> dict[str, str]:
    """What a figure cannot be read without; `threads` if a CPU was not given all that torch has."""
    # Not above: Triton reads how kernels are to run when it is first imported.
    from lwadamw.lab.sweep import cpu_name

    cuda, threads = device.type == "cuda", threads or torch.get_num_threads()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "-"
    on_cpu = f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else on_cpu,
        "driver": driver or "unknown",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def one_line(description: Mapping[str, str]) -> str:
    """A machine's description as it stands under a table, the commit shortened."""
    head, *dirty = description["commit"].split("+")
    short = {**description, "commit": "+".join([head[:10], *dirty])}
    return ", ".join(value if key == "device" else f"{key} {value}" for key, value in short.items() if value != "-")


class Timer:
    """Seconds per call over several consecutive calls: by device events on a GPU, by the clock on a CPU.

    So a figure is what one call adds to a training loop: time on the device or on the host, whichever is longer.

    Args:
        steps: calls per measurement at most.
        seconds: a measurement takes about this long, if that many calls allow it.
    """

    def __init__(self, device: torch.device, steps: int = 50, seconds: float = 0.1) -> None:
        self.device, self.steps, self.seconds = device, steps, seconds

    def calls_for(self, once: float) -> int:
        """Calls per measurement of something that takes `once` seconds."""
        return min(self.steps, max(1, round(self.seconds / max(once, 1e-9))))

    def __call__(self, call: Callable[[], object], calls: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / calls


def shuffled(names: Iterable[str], round_: int) -> list[str]:
    """Names in an order of their own for every round: what ran before leaves caches as it needed them."""
    order = list(names)
    random.Random(round_).shuffle(order)
    return order


def interleaved(
    timer: Timer, calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float | None = None
) -> dict[str, list[float]]:
    """Seconds per call by name, one value per round; in a round every contestant has its turn, in another order each time.

    Each is called three times before: the first call compiles, the third tells how many calls a measurement takes.
    `seconds` ends the rounds early, but not before the third.
    """
    counts = {}
    for name, call in calls.items():
        timer(call, 2)
        counts[name] = timer.calls_for(timer(call, 1))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + (seconds or float("inf"))
    for round_ in range(rounds):
        if round_ >= 3 and time.perf_counter() > end:
            break
        for name in shuffled(calls, round_):
            times[name].append(timer(calls[name], counts[name]))
    return times


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 with linear interpolation between the values."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": deciles[1], "p50": statistics.median(values), "p80": deciles[7]}


def ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """How many times faster `name` is than `reference`: the median over rounds, in each of which both saw one machine."""
    return statistics.median(r / t for r, t in zip(times[reference], times[name], strict=True))


def parser_for(module_doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with what every command has: its docstring as help, --device, --json, --dry-run."""
    parser = argparse.ArgumentParser(description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and few rounds: does the command run?")
    parser.set_defaults(**defaults)
    return parser


def write_json(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record, figures rounded to what is known of them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_rounded(record), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def finish(
    path: Path | None, module: str, device: torch.device, figures: Mapping[str, Any], threads: int | None = None
) -> None:
    """The end of every command: its machine under its table, and the record with both."""
    described = machine(device, threads)
    print(one_line(described))
    write_json(path, {"command": command_line(module), "machine": described, **figures})


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Markdown, the columns lined up: the first `left` to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def command_line(module: str) -> str:
    """The command as it was given, for the record; not where its figures went."""
    given = " ".join(["python -m", module, *sys.argv[1:]])
    return re.sub(r" --json[ =]\S+", "", given)
