"""All tests that a GPU can answer, on a bare machine, and a table of what failed.

    make gpu-test                                   # or: python -m bench.gpu_tests --out results
    make gpu-test MINUTES=9                         # or: python -m bench.gpu_tests --minutes 9
    python -m bench.gpu_tests --only functions --minutes 3

It runs these parts side by side, in processes of their own, so that neither a failure nor a crash hides another test:

    functions   the tests of tests/kernels/test_gpu*.py. They need torch, triton and numpy only.
    suite       other test files of the project, with tensors on the GPU. They need pytest: carry it in a folder of PYTHONPATH.
    sanitizer   tests/kernels/small_steps.py under compute-sanitizer, which looks for accesses outside of tensors and for races.
                Not every machine has compute-sanitizer, or allows it.

The JSON file is written again after each process. After --minutes, what still runs is ended and reported as not finished, with
the failures that it had printed. The table at the end has at most 30 lines.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import unittest
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.harness import log

PARTS = ("functions", "suite", "sanitizer")
MINUTES = 4.0
AT_ONCE = 12  # processes that share the GPU
FUNCTION_JOBS = 7
ROWS, SKIPPED_ROWS = 18, 4  # failures and skipped functions that the table shows
# Test files of the part `suite`, below tests/, in the order in which they start: whether each storage steps right comes first.
SUITE = (
    "state/test_storage_kernels.py",
    "step/test_backends.py",
    "state/test_storage.py",
    "step/test_norms.py",
    "step/test_clipping.py",
    "kernels/test_draws.py",
    "kernels/test_rounding.py",
    "state/test_codes.py",
    "state/test_gradient_storage.py",
    "tables/test_changes.py",
    "step/test_torch_parity.py",
    "tables/test_grouping.py",
    "tables/test_launches.py",
    "step/test_protocol.py",
    "step/test_amp.py",
    "step/test_gradient_release.py",
    "state/test_decay.py",
    "state/test_huber.py",
    "state/test_checkpoint.py",
    "state/test_decay_checkpoint.py",
    "step/test_modes.py",
    "state/test_convergence.py",
    "monitor/test_columns.py",
    "monitor/test_monitor.py",
    "monitor/test_resume.py",
)
SANITIZERS = ("memcheck", "racecheck")
# A line of the summary, or of a test that has just ended. The second kind is all there is of a process that was ended.
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", re.MULTILINE)
_ENDED = re.compile(r"^(\S.*?) (?:FAILED|ERROR) +\[", re.MULTILINE)
_SKIPPED = re.compile(r"^skipped (\S+) - (.*)$", re.MULTILINE)
_running: set[subprocess.Popen[str]] = set()


@dataclass
class Job:
    """One process.

    Attributes:
        part: one of PARTS.
        name: what the table calls it.
        command: its arguments.
        outcome: "passed", "FAILED", "not finished" or "not run".
        last: the last line that it printed, or why it was not run.
        seconds: how long it took.
        failures: the tests that failed, each with the first line of its error.
        skipped: test functions that this machine cannot run, each with the reason.
    """

    part: str
    name: str
    command: list[str]
    outcome: str = "not run"
    last: str = ""
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def run(self, end: float) -> Job:
        """Run the process until `end`, in seconds of time.monotonic, and return the job with its results."""
        begin = time.monotonic()
        if self.last:
            return self
        if begin >= end:
            self.last = "no time left"
            return self
        path = os.pathsep.join(filter(None, (".", os.environ.get("PYTHONPATH"))))
        # A session of its own, so that processes of the process end with it: they would use the GPU on, and hold the pipe open.
        process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=harness.ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},  # a process that is ended has told all
            start_new_session=True,
        )
        _running.add(process)
        try:
            printed, error = process.communicate(timeout=end - begin)
            self.outcome = "FAILED" if process.returncode else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, error = process.communicate()
            self.outcome = "not finished"
        _running.discard(process)
        self._read(f"{error}\n{printed}")
        self.seconds = time.monotonic() - begin
        return self

    def _read(self, printed: str) -> None:
        lines = printed.strip().splitlines() or ["nothing was printed"]
        self.last = lines[-1].strip("= ")
        self.failures = [(test, error or "") for test, error in _FAILED.findall(printed)]
        self.skipped = _SKIPPED.findall(printed)
        told = {test for test, _ in self.failures}
        self.failures += [(test, "see the log") for test in _ENDED.findall(printed) if test not in told]
        if self.outcome != "passed":
            print(f"\n{self.name}:\n{printed[-12000:]}", flush=True)
            unfinished = "not finished: " if self.outcome == "not finished" else ""
            self.failures = self.failures or [(self.name, unfinished + self.last)]


def gpu_tests() -> dict[str, Callable[[], None]]:
    """The test functions of tests/kernels/test_gpu.py and test_gpu_storage.py by name. They need no pytest and no fixtures."""
    from tests.kernels import test_gpu, test_gpu_storage

    return {
        f"{module.__name__.rpartition('.')[2]}.py::{name}": function
        for module in (test_gpu_storage, test_gpu)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("test_")
    }


def run_functions(names: Sequence[str], dry: bool) -> int:
    """Run some of `gpu_tests`, print an outcome for each, and return how many failed.

    Args:
        names: keys of `gpu_tests`.
        dry: only look the functions up.
    """
    tests, failed, skipped = gpu_tests(), 0, 0
    for name in names:
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            if not dry:
                tests[name]()
            print(f"passed {name} ({time.perf_counter() - begin:.1f} s)", flush=True)
        except unittest.SkipTest as reason:
            skipped += 1
            print(f"skipped {name} - {reason}", flush=True)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0]
            print(f"FAILED {name} - {type(error).__name__}: {first[:200]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{len(names) - failed - skipped} passed, {failed} failed" + f", {skipped} skipped" * bool(skipped))
    return failed


def jobs(parts: Sequence[str], files: Sequence[str], dry: bool) -> list[Job]:
    """Return the processes to run, the longest first.

    Args:
        parts: some of PARTS.
        files: test files of the part `suite`.
        dry: let each process only find what it would run. Small steps are taken on the CPU.
    """
    python, flags, out = sys.executable, ["--dry-run"] if dry else [], []
    if "functions" in parts:
        names, at_once = list(gpu_tests()), 1 if dry else FUNCTION_JOBS
        for i in range(at_once):
            own = names[i::at_once]
            out.append(
                Job("functions", f"functions {i}", [python, "-m", "bench.gpu_tests", *flags, "--functions", *own])
            )
    if "sanitizer" in parts:
        sanitizer, steps = (
            shutil.which("compute-sanitizer"),
            [python, "-m", "tests.kernels.small_steps", *(["fp32"] if dry else [])],
        )
        for tool in SANITIZERS[:1] if dry else SANITIZERS:
            prefix = [] if dry else [sanitizer or "", "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60"]
            missing = "" if dry or sanitizer else "compute-sanitizer is not installed"
            out.append(Job("sanitizer", tool, prefix + steps, last=missing))
    if "suite" in parts:
        # -vv names each test when it ends, in spite of the -q of pyproject.toml. A test that hangs shows where it is, after a
        # minute.
        pytest = [python, "-m", "pytest", "-vv", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
        pytest += ["-o", "filterwarnings=default", "-o", "faulthandler_timeout=60", *["--collect-only"] * dry]
        missing = "" if find_spec("pytest") else "pytest is not installed: carry it in a folder of PYTHONPATH"
        out += [Job("suite", name, [*pytest, f"tests/{name}"], last=missing) for name in files]
    return out


def table(done: Sequence[Job]) -> str:
    """Which tests failed, and what each part did. At most 30 lines."""
    failed = [(job.part, test, error) for job in done for test, error in job.failures]
    lines = []
    if failed:
        rows = [(part, test[-70:], error[:90]) for part, test, error in failed[:ROWS]]
        lines.append(harness.table(["part", "failed", "error"], rows, left=3))
        if len(failed) > ROWS:
            lines.append(f"and {len(failed) - ROWS} more, see the JSON file")
    for part in dict.fromkeys(job.part for job in done):
        own = [job for job in done if job.part == part]
        counts = {o: sum(job.outcome == o for job in own) for o in ("passed", "FAILED", "not finished", "not run")}
        reasons = sorted({job.last for job in own if job.outcome == "not run"})
        said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
        lines.append(f"{part}: {said} of {len(own)} processes{': ' if reasons else ''}{'; '.join(reasons)}")
    skipped = [f"skipped {test}: {reason}" for job in done for test, reason in job.skipped]
    lines += skipped[:SKIPPED_ROWS]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=harness.ROOT / "bench/results", help="folder for the JSON file")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run only these parts")
    parser.add_argument("--files", nargs="+", default=list(SUITE), help="test files of the part suite, below tests/")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the command ends after this time")
    parser.add_argument("--functions", nargs="+", help="run these test functions in this process, and nothing else")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: start every process, and let it find its tests"
    )
    return parser.parse_args()


def main() -> None:
    """Run the parts, write the JSON file and print the table."""
    arguments = parse()
    dry = arguments.dry_run
    device = harness.choose_device("cpu" if dry else "cuda")
    if arguments.functions:
        sys.exit(min(run_functions(arguments.functions, dry), 1))
    begin = time.monotonic()
    described = harness.machine(device)
    name = "test_dry_run" if dry else "test_" + described["device"].replace(" ", "_").lower()
    record: dict[str, Any] = {"command": harness.command_line("bench.gpu_tests"), "machine": described}
    done: list[Job] = []
    end = begin + 60 * arguments.minutes
    with ThreadPoolExecutor(AT_ONCE if not dry else os.cpu_count()) as pool:
        started = [pool.submit(job.run, end) for job in jobs(arguments.only, arguments.files, dry)]
        try:
            for future in as_completed(started):
                done.append(future.result())
                log(f"{done[-1].outcome} {done[-1].name} ({done[-1].seconds:.1f} s): {done[-1].last[:100]}")
                record["jobs"] = [asdict(job) for job in done]
                harness.write_json(arguments.out / f"{name}.json", record)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    print(f"\n{table(done)}\n{harness.one_line(described)}")
    if any(job.failures for job in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
