"""Functions that the benchmark commands share: a description of the machine, a timer, quantiles, JSON and tables."""

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
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
CODE = ROOT / "bench/results/codegen.json"  # what bench.codegen found out about the kernels as they are


def log(message: str) -> None:
    """Print a message with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def choose_device(name: str | None) -> torch.device:
    """Choose the device of a benchmark, and set up interpreted kernels if it is the CPU.

    Args:
        name: "cuda" or "cpu"; None: a GPU if there is one, else the CPU.

    Raises:
        SystemExit: "cuda" was given and torch sees no GPU.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU on this machine. Use --dry-run, or --device cpu if the command has it.")
    if device.type == "cpu":
        # Triton reads this variable once, when the kernels are imported for the first time.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return device


def output(*command: str) -> str | None:
    """The standard output of a command without surrounding spaces, or None if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """The commit that is measured.

    Returns:
        The environment variable LWADAMW_COMMIT if it is set, for a copy without a repository. Otherwise the commit from git,
        with "+dirty" added if tracked files differ from the commit. "unknown" without git.
    """
    given = os.environ.get("LWADAMW_COMMIT")
    if given:
        return given
    head = output("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+dirty" if output("git", "status", "--porcelain", "--untracked-files=no") else "")


def version_of(module: str) -> str:
    """The version of an installed module, or "none"."""
    return importlib.import_module(module).__version__ if importlib.util.find_spec(module) else "none"


def machine(device: torch.device, threads: int | None = None) -> dict[str, str]:
    """Describe the machine: device, driver, versions, commit and date. Every published number needs this description.

    Args:
        device: the device that was measured.
        threads: number of CPU threads that the benchmark used; None: all threads of torch.
    """
    # This import is not at the top, because Triton reads TRITON_INTERPRET when it is imported for the first time.
    from lwadamw.lab.sweep import cpu_name

    cuda, threads = device.type == "cuda", threads or torch.get_num_threads()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "-"
    on_cpu = f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else on_cpu,
        "driver": driver.splitlines()[0] if driver else "unknown",  # a line for each GPU
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def one_line(description: Mapping[str, str]) -> str:
    """The description of a machine as one line under a table, with a shortened commit."""
    head, *dirty = description["commit"].split("+")
    short = {**description, "commit": "+".join([head[:10], *dirty])}
    return ", ".join(value if key == "device" else f"{key} {value}" for key, value in short.items() if value != "-")


class Limit:
    """The time at which a command ends, whatever it does then: a compilation of another package or a kernel may take long.

    Args:
        minutes: from now.
        tell: prints and writes what there is, and returns the exit code. It runs in a thread of its own, and the process ends
            after it.
    """

    def __init__(self, minutes: float, tell: Callable[[], int]) -> None:
        self._tell = tell
        self._timer = threading.Timer(60 * minutes, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        code = 1
        try:
            code = self._tell()
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)  # The main thread may be where no exception reaches it.

    def cancel(self) -> None:
        """The command has done everything."""
        self._timer.cancel()


class Timer:
    """Measures seconds per call over several consecutive calls.

    On a GPU it uses device events, on a CPU the clock. So the result is the time that one call adds to a training loop: the
    time on the device or the time on the host, whichever is longer. On a GPU one more call runs before the first event. Else an
    idle device would wait for the host of the first call, and the wait would count.

    Args:
        device: the device that the calls use.
        steps: largest number of calls in one measurement.
        seconds: one measurement takes about this long, if `steps` calls are enough for it.
    """

    def __init__(self, device: torch.device, steps: int = 50, seconds: float = 0.1) -> None:
        self.device, self.steps, self.seconds = device, steps, seconds

    def calls_for(self, once: float) -> int:
        """Number of calls in one measurement, if one call takes `once` seconds."""
        return min(self.steps, max(1, round(self.seconds / max(once, 1e-9))))

    def __call__(self, call: Callable[[], object], calls: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        call()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / calls


def shuffled(names: Iterable[str], round_: int) -> list[str]:
    """The names in a random order that differs from round to round.

    Each contestant leaves the caches in a state that suits itself. A fixed order would always favour the same one.
    """
    order = list(names)
    random.Random(round_).shuffle(order)
    return order


def interleaved(
    timer: Timer, calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float | None = None
) -> dict[str, list[float]]:
    """Time contestants in turn. In every round each contestant has one turn, in another order each time.

    Before the first round each contestant is called a few times. The first call compiles. The time of the last call gives the
    number of calls in one measurement.

    Args:
        timer: measures one turn.
        calls: the function to time, by name of the contestant.
        rounds: number of rounds.
        seconds: stop after this time, but not before three rounds are done; None: no limit.

    Returns:
        Seconds per call, by name, one value per round.
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
    """The quantiles p20, p50 and p80, with linear interpolation between the values."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": deciles[1], "p50": statistics.median(values), "p80": deciles[7]}


def ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """How many times faster `name` is than `reference`.

    This is the median of the ratios within each round. Within a round both ran at about the same time, so a machine that
    becomes slower does not change the ratio.
    """
    return statistics.median(r / t for r, t in zip(times[reference], times[name], strict=True))


def parser_for(module_doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """An argument parser with the options that every command has: --device, --json, --dry-run.

    Args:
        module_doc: docstring of the command, shown as its help.
        **defaults: default values of arguments.
    """
    parser = argparse.ArgumentParser(description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--dry-run", action="store_true", help="use tiny sizes and few rounds, to check that the command runs"
    )
    parser.set_defaults(**defaults)
    return parser


def write_json(path: Path | None, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, with numbers rounded to five digits. Nothing is written if the path is None.

    A command that is stopped leaves a whole file behind.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(_rounded(record), indent=1) + "\n")
        unfinished.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def finish(
    path: Path | None, module: str, device: torch.device, figures: Mapping[str, Any], threads: int | None = None
) -> None:
    """End a command: print the description of the machine, and write it with the results to a file.

    Args:
        path: file for the record; None: no file.
        module: name of the command, for example "bench.step".
        device: the device that was measured.
        figures: the results.
        threads: number of CPU threads that the benchmark used; None: all threads of torch.
    """
    described = machine(device, threads)
    print(one_line(described))
    write_json(path, {"command": command_line(module), "machine": described, **figures})


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table with aligned columns.

    Args:
        header: titles of the columns.
        rows: cells of each row.
        left: this many columns are aligned to the left, the others to the right.
    """
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def command_line(module: str) -> str:
    """The command as it was typed, for the record, without the --json option."""
    given = " ".join(["python -m", module, *sys.argv[1:]])
    return re.sub(r" --json[ =]\S+", "", given)
