"""Sweeps: what the file holds when a sweep is killed or restarted, or when some of its runs fail."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

import lwadamw
from lwadamw.commands import main
from lwadamw.lab import sweep as sweeps
from lwadamw.lab.arms import arm_rule
from lwadamw.lab.data import from_file
from lwadamw.lab.pool import Failure, Step, run_all
from lwadamw.lab.study import RESULT, Training, train
from lwadamw.lab.sweep import sweep
from lwadamw.lab.table import RunTable
from lwadamw.lab.training import Run, Settings

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = Settings(base_width=32, depth=1, context=16, batch=2, steps=12, cooldown=0.25)
PATIENCE = 120  # seconds until a test gives up on a process; a busy machine may need many


@dataclass(frozen=True)
class Nap:
    """A run that takes a tenth of a second. `does` says how the run ends."""

    number: int
    does: str = "sleep"

    def shared(self):
        return self

    cost = 1.0
    memory = 0


def nap(task, device, alive):
    if task.does == "raise":
        raise ZeroDivisionError("as asked")
    if task.does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(10):
        time.sleep(0.01)
        alive(step + 1, 10, 0.5)
    return {"square": task.number**2}


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def in_process(monkeypatch):
    """Sweeps make their runs in this process, for tests that are not about processes. Returns the tasks that were made.

    A process has to import torch, which takes seconds.
    """
    made = []

    def run_here(work, tasks, device, jobs, threads, seen):
        for task in tasks:
            made.append(task)
            yield task, work(task, device, lambda *_: None)

    monkeypatch.setattr(sweeps, "run_all", run_here)
    return made


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(torch.randint(97, 123, (20_000,), dtype=torch.uint8).numpy().tobytes())
    return path


TASKS = [Nap(i) for i in range(12)]


def main_of_the_killed_process(path):
    """Run a sweep that prints a line at its start and at the end of every run."""
    sweep(TASKS, nap, ["square"], Path(path), CPU, jobs=2, show=lambda line: print(line, flush=True))


def kill_after(runs, path):
    """Start a sweep in a process, and kill the process when it has said that so many runs have ended."""
    code = "import sys; from tests.lab import test_sweep; test_sweep.main_of_the_killed_process(sys.argv[1])"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "runs there" in process.stdout.readline()
            for _ in range(runs):
                assert "left" in process.stdout.readline()
            workers = [pid for pid in children_of(process.pid) if is_worker(pid)]
        finally:
            process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while any(map(is_worker, workers)):
        assert time.monotonic() < deadline, "processes outlive the process that started them"
        time.sleep(0.02)
    assert runs == 0 or len(workers) == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes of the machine from /proc")
@pytest.mark.parametrize(
    "kills", [pytest.param((3,), id="once"), pytest.param((0, 1, 7), id="several times", marks=pytest.mark.slow)]
)
def test_a_sweep_killed_at_any_moment_goes_on_where_it_was(kills, tmp_path, in_process):
    """A run that was said to have ended is in the file, no run is there twice, and no process stays behind."""
    path, ended = tmp_path / "naps.csv", 0
    for runs in kills:
        kill_after(runs, path)
        ended += runs
        there = rows_of(path) if path.exists() else []
        assert len(there) >= ended
        assert all(int(row["square"]) == int(row["number"]) ** 2 for row in there)
    sweep(TASKS, nap, ["square"], path, CPU, jobs=1)
    assert Counter(row["number"] for row in rows_of(path)) == {str(task.number): 1 for task in TASKS}
    assert 0 < len(in_process) <= len(TASKS) - ended


def children_of(pid):
    """Numbers of the child processes that a process started from its main thread."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_worker(pid):
    """Whether a process is there and is a worker of a sweep. A process that has ended has no command line."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_the_incomplete_row_of_a_killed_writer_is_cut_off(tmp_path):
    path = tmp_path / "runs.csv"
    with RunTable(path, ["a", "b"], ["loss"]) as table:
        table.append([{"a": 0.1, "b": "x,y", "loss": math.nan}])
    path.write_bytes(path.read_bytes() + b"0.2,half a r")
    with RunTable(path, ["a", "b"], ["loss"]) as table:
        assert table.done == {("0.1", "x,y")}
        table.append([{"a": 1 / 3, "b": "z", "loss": 2 / 7}])
    one, two = rows_of(path)
    assert one == {"a": "0.1", "b": "x,y", "loss": ""}
    assert (float(two["a"]), float(two["loss"])) == (1 / 3, 2 / 7)


def test_a_run_is_not_written_twice(tmp_path):
    with RunTable(tmp_path / "runs.csv", ["a"], ["loss"]) as table:
        table.append([{"a": 1, "loss": 1.0}])
        with pytest.raises(ValueError, match="a run is there already, {'a': '1'}"):
            table.append([{"a": 2, "loss": 2.0}, {"a": 1, "loss": 2.0}])
    assert len(rows_of(tmp_path / "runs.csv")) == 1


def test_a_file_of_another_sweep_and_a_file_in_use_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    with RunTable(path, ["a"], ["loss"]), pytest.raises(ValueError, match="another sweep is writing"):
        RunTable(path, ["a"], ["loss"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"not those of this sweep \(different: b\)"):
        RunTable(path, ["a", "b"], ["loss"])
    assert path.read_bytes() == before


@pytest.mark.matrix
def test_a_run_that_fails_is_reported_and_not_in_the_file(tmp_path):
    path, lines = tmp_path / "naps.csv", []
    tasks = [Nap(0), Nap(1, "raise"), Nap(2, "die"), Nap(3), Nap(4)]
    failures = sweep(tasks, nap, ["square"], path, CPU, jobs=1, show=lines.append)
    assert [row["number"] for row in rows_of(path)] == ["0", "3", "4"]
    raised, died = failures
    assert "ZeroDivisionError: as asked" in raised.text
    assert "exit code -9" in died.text
    assert sum("FAILED" in line for line in lines) == 2


def test_the_next_sweep_tries_a_run_that_failed_again(tmp_path, monkeypatch):
    path, seen = tmp_path / "naps.csv", []

    def run_none(work, tasks, *args, **kwargs):
        seen.append(list(tasks))
        return iter([(task, Failure("failed") if task.number == 1 else {"square": 0}) for task in tasks])

    monkeypatch.setattr(sweeps, "run_all", run_none)
    tasks = [Nap(0), Nap(1), Nap(2)]
    for _ in range(2):
        (failure,) = sweep(tasks, nap, ["square"], path, CPU, show=lambda line: None)
        assert failure.text == "failed"
    assert seen == [tasks, [Nap(1)]]
    assert [row["number"] for row in rows_of(path)] == ["0", "2"]


@pytest.mark.matrix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes of the machine from /proc")
def test_ending_the_iteration_ends_the_processes():
    before = set(children_of(os.getpid()))
    steps = []
    outcomes = run_all(nap, [Nap(i) for i in range(8)], CPU, 2, 1, seen=lambda task, step: steps.append((task, step)))
    task, result = next(outcomes)
    assert (task, Step(1, 10, 0.5)) in steps
    assert not isinstance(result, Failure)
    assert result == {"square": task.number**2}
    workers = [pid for pid in children_of(os.getpid()) if pid not in before and is_worker(pid)]
    assert len(workers) == 2
    outcomes.close()
    assert not any(map(is_worker, workers))


def test_a_diverged_run_is_recorded_as_diverged(text):
    task = Training.of("standard", 32, replace(TINY, lr=1e6, weight_decay=1e-9), str(text))
    result = train(task, CPU, lambda *_: None)
    assert result["status"] == "diverged"
    assert math.isnan(result["loss"])
    assert set(result) <= {*RESULT, "seconds"}


def test_the_result_of_a_run_holds_its_effective_values(text):
    task = Training.of("lr=-0.5,wd=0.25", 128, replace(TINY, lr=0.01, weight_decay=2.0), str(text))
    result = train(task, CPU, lambda *_: None)
    lr, wd = 0.01 * 4**-0.5, 2.0 * 4**0.25
    assert result["status"] == "done"
    assert (result["effective_lr"], result["effective_wd"]) == pytest.approx((lr, wd))
    factors = [task.settings.factor(step) for step in range(12)]
    assert factors[:9] == [1.0] * 9
    assert factors[9:] == pytest.approx([0.75, 0.5, 0.25])
    assert result["taus"] == pytest.approx(sum(factors) * lr * wd)
    assert result["tokens"] == 12 * 2 * 16
    run = Run(task.settings, 128, from_file(text), CPU)
    for _ in run.train():
        pass
    run.evaluate()
    assert result["loss"] == pytest.approx(run.validation, rel=1e-6)
    assert result["steps_done"] == 12


def test_at_the_proxys_width_all_arms_share_one_run(tmp_path, text, in_process):
    arms = ("mup", "fan2025", "lr=-0.5,wd=0.25")
    tasks = [Training.of(arm, width, TINY, str(text)) for width in (32, 64) for arm in arms]
    lines = []
    assert not sweep(tasks, train, RESULT, tmp_path / "runs.csv", CPU, jobs=1, show=lines.append)
    assert len(in_process) == 1 + 3
    assert len(lines) == 1 + 1 + 3
    rows = rows_of(tmp_path / "runs.csv")
    assert len(rows) == 6
    assert len({row["loss"] for row in rows if row["width"] == "32"}) == 1
    assert len({row["loss"] for row in rows if row["width"] == "64"}) == 3


def test_arms_are_rules_or_exponents():
    assert arm_rule("balanced").matrix.wd == 0.75
    assert asdict(arm_rule("lr=-1,wd=0.3").matrix) == {"lr": -1.0, "wd": 0.3, "eps": 0.0}
    for arm in ("lr=x", "width=1", "lr"):
        with pytest.raises(ValueError, match="fan2025"):
            arm_rule(arm)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--arms", "nobody2026"], "--arms: unknown rule 'nobody2026'"),
        (["--widths", "64", "100"], "--widths: ModelConfig: width=100 is not a whole number of heads"),
        (["--cooldown", "1"], "--cooldown: 1.0 is not a share"),
        (["--data", "nowhere.txt"], "--data: cannot read 'nowhere.txt'"),
        (["--out", "nowhere/runs.csv"], "--out: 'nowhere/runs.csv' is in a folder that does not exist, 'nowhere'"),
        (["--plot", "runs.jpg"], "--plot: 'runs.jpg' ends in none of .svg, .png, .pdf"),
    ],
)
def test_the_message_about_a_bad_argument_names_the_argument(arguments, problem, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *arguments])
    assert exit_.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_version_in_the_rows_is_not_the_commit_of_another_repository(tmp_path, monkeypatch):
    """Such as the repository of a project whose environment the package is installed in."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=user", "-c", "user.email=user@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    lab = tmp_path / ".venv" / "site-packages" / "lwadamw" / "lab"
    lab.mkdir(parents=True)
    monkeypatch.setattr(sweeps, "__file__", str(lab / "sweep.py"))
    assert sweeps._version() == lwadamw.__version__
