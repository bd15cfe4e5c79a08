"""Progress within runs of a sweep: few lines in a file, changing lines on a terminal, Ctrl-C and closed pipes."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lwadamw.commands import INTERRUPTED, UNREAD
from lwadamw.lab.pool import Step, _Worker
from lwadamw.lab.progress import Progress
from tests.lab.test_sweep import nap

ROOT = Path(__file__).parents[2]
SWEEP = [sys.executable, "-m", "lwadamw", "sweep", "--mini", "--steps", "2000", "--jobs", "2", "--out"]
PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads processes from /proc")


class Clock:
    """A clock that stands still until a test moves it."""

    now = 0.0

    def __call__(self):
        return self.now


def at(clock, progress, seconds, run="a", step=10):
    clock.now = seconds
    progress.step(run, Step(step, 100, 1.5))


def test_a_file_gets_a_line_after_a_minute_and_then_fewer_and_fewer():
    clock, lines = Clock(), []
    with Progress(lines.append, {"a": 3.0, "b": 1.0}, str, clock=clock) as progress:
        for second in range(0, 3600, 5):
            at(clock, progress, second, step=10 + second // 60)
            lines[:] = [line if isinstance(line, tuple) else (second, line) for line in lines]
    assert [second for second, _ in lines] == [60, 180, 420, 900, 1500, 2100, 2700, 3300]
    assert lines[0][1] == "0/2  11 min left  running  a  step 11/100  loss 1.5000"


def test_the_end_of_a_run_counts_as_a_line_and_shortens_the_pause():
    clock, lines = Clock(), []
    with Progress(lines.append, {"a": 1.0, "b": 1.0}, str, clock=clock) as progress:
        for second in (0, 60, 100, 110):
            at(clock, progress, second)
        progress.ended("a")
        progress.line("ended")
        at(clock, progress, 169, "b")
        assert lines[1:] == ["ended"]
        at(clock, progress, 170, "b")
    assert lines[2].startswith("1/2  ")
    assert "running  b" in lines[2]


def test_the_time_left_counts_the_parts_of_runs_by_their_cost():
    clock = Clock()
    progress = Progress(print, {"long": 9.0, "short": 1.0}, str, clock=clock)
    at(clock, progress, 90, "long", step=50)
    assert progress.rate() == "0/2  110 s left"
    progress.ended("short")
    assert progress.rate() == "1/2  74 s left"


def test_of_many_runs_a_few_are_named():
    clock, lines = Clock(), []
    progress = Progress(lines.append, dict.fromkeys("abcdef", 1.0), str, clock=clock)
    for run in "abcde":
        at(clock, progress, 0, run)
    at(clock, progress, 60, "f")
    assert [line.split("running  ")[-1][0] for line in lines[:3]] == ["a", "b", "c"]
    assert lines[3:] == ["and 3 more are running"]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_terminal_shows_every_run_without_colours_where_none_are_wanted(term, monkeypatch):
    pytest.importorskip("rich")
    out = _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(print, {"a[red]": 1.0, "b": 1.0}, str, live=True) as progress:
        progress.step("a[red]", Step(10, 100, 1.5))
        progress.step("b", Step(20, 100, float("nan")))
        progress.line("c [bold]has ended[/bold]")
    seen = out.getvalue()
    assert "c [bold]has ended[/bold]" in seen
    assert ("running  a[red]  step 10/100  loss 1.5000" in seen) == (term != "dumb")
    assert ("running  b  step 20/100" in seen) == (term != "dumb")
    assert not re.search(r"\x1b\[[0-9;]*m", seen), "a colour"


@pytest.mark.matrix
@PROC
def test_a_process_of_a_sweep_ignores_ctrl_c_from_its_first_moment():
    worker = _Worker(nap, torch.device("cpu"), 1)
    try:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        blocked = int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16)
        assert blocked >> signal.SIGINT - 1 & 1
    finally:
        worker.process.kill()
        worker.process.join()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.matrix
def test_ctrl_c_ends_a_sweep_with_one_word(tmp_path):
    with subprocess.Popen(
        [*SWEEP, str(tmp_path / "runs.csv")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert "runs there" in process.stdout.readline()
        time.sleep(3.0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
        _, error = process.communicate(timeout=60)
    assert error == "interrupted\n"
    assert process.returncode == INTERRUPTED


@pytest.mark.matrix
def test_a_sweep_whose_output_nobody_reads_ends_silently(tmp_path):
    arguments = ["--steps", "3", "--widths", "32", "--seeds", "1"]
    with subprocess.Popen(
        [*SWEEP, str(tmp_path / "runs.csv"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert "runs there" in process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        process.wait(timeout=60)
    assert error == ""
    assert process.returncode == UNREAD
