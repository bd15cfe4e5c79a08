"""Sweeps: what is in the file when they are killed, restarted, or some of their runs fail."""

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

from lwadamw.commands import main
from lwadamw.lab.data import from_file
from lwadamw.lab.pool import Failure, run_all
from lwadamw.lab.study import RESULT, Training, arm_rule, train
from lwadamw.lab.sweep import sweep
from lwadamw.lab.table import RunTable
from lwadamw.lab.training import Run, Settings

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = Settings(base_width=32, depth=1, context=16, batch=2, steps=12, cooldown=0.25)


@dataclass(frozen=True)
class Nap:
    """A run that takes a while; `does` says how it ends."""

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
    for _ in range(10):
        time.sleep(0.01)
        alive()
    return {"square": task.number**2}


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(torch.randint(97, 123, (20_000,), dtype=torch.uint8).numpy().tobytes())
    return path


def test_a_sweep_killed_at_any_moment_goes_on_where_it_was(tmp_path):
    """Nothing that was said to have ended is lost, nothing is there twice, and no process stays behind."""
    path, tasks = tmp_path / "naps.csv", 16
    code = (
        "import torch; from pathlib import Path; from tests.lab.test_sweep import Nap, nap\n"
        "from lwadamw.lab.sweep import sweep\n"
        f"sweep([Nap(i) for i in range({tasks})], nap, ['square'], Path({str(path)!r}), torch.device('cpu'), jobs=2,"
        " show=lambda line: print(line, flush=True))"
    )
    ended = 0
    for lines in (2, 8, None):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        seen = 0
        for line in process.stdout:
            seen += "FAILED" not in line and "/" in line.split()[0]
            if seen == lines:
                process.send_signal(signal.SIGKILL)
                break
        children = _children(process.pid)
        process.stdout.close()
        process.wait()
        there = rows_of(path)
        # The first line says what is there, the others each that a run has ended.
        ended += max(0, seen - 1)
        assert len(there) >= ended
        assert all(int(row["square"]) == int(row["number"]) ** 2 for row in there)
        _wait_until_gone(children)
    assert Counter(row["number"] for row in rows_of(path)) == dict.fromkeys(map(str, range(tasks)), 1)


def _children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def _wait_until_gone(pids):
    deadline = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.time() < deadline, "processes outlive the one that started them"
        time.sleep(0.05)


def test_what_a_killed_writer_left_of_a_row_is_cut_off(tmp_path):
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


def test_another_sweeps_file_and_a_file_in_use_are_refused(tmp_path):
    path = tmp_path / "runs.csv"
    with RunTable(path, ["a"], ["loss"]), pytest.raises(ValueError, match="another sweep is writing"):
        RunTable(path, ["a"], ["loss"])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"not those of this sweep \(different: b\)"):
        RunTable(path, ["a", "b"], ["loss"])
    assert path.read_bytes() == before


def test_a_run_that_fails_is_said_and_tried_again(tmp_path):
    path, lines = tmp_path / "naps.csv", []
    tasks = [Nap(0), Nap(1, "raise"), Nap(2, "die"), Nap(3), Nap(4)]
    for _ in range(2):
        failures = sweep(tasks, nap, ["square"], path, CPU, jobs=2, show=lines.append)
        assert sorted(row["number"] for row in rows_of(path)) == ["0", "3", "4"]
        assert any("ZeroDivisionError: as asked" in f.text for f in failures)
        assert any("exit code -9" in f.text for f in failures)
    assert sum("FAILED" in line for line in lines) == 4


def test_ending_the_iteration_ends_the_processes():
    outcomes = run_all(nap, [Nap(i) for i in range(8)], CPU, 2, 1)
    task, result = next(outcomes)
    assert not isinstance(result, Failure)
    assert result == {"square": task.number**2}
    children = _children(os.getpid())
    outcomes.close()
    assert all(not Path(f"/proc/{pid}/exe").exists() for pid in children if _is_worker(pid))


def _is_worker(pid):
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_diverged_run_is_recorded_as_diverged(text):
    task = Training.of("standard", 32, replace(TINY, lr=1e6, weight_decay=1e-9), str(text))
    result = train(task, CPU, lambda: None)
    assert result["status"] == "diverged"
    assert math.isnan(result["loss"])
    assert set(result) <= {*RESULT, "seconds"}


def test_a_run_says_what_it_was_trained_with(text):
    task = Training.of("lr=-0.5,wd=0.25", 128, replace(TINY, lr=0.01, weight_decay=2.0), str(text))
    result = train(task, CPU, lambda: None)
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


def test_at_the_proxys_width_all_arms_are_one_run(tmp_path, text):
    arms = ("mup", "fan2025", "lr=-0.5,wd=0.25")
    tasks = [Training.of(arm, width, TINY, str(text)) for width in (32, 64) for arm in arms]
    lines = []
    assert not sweep(tasks, train, RESULT, tmp_path / "runs.csv", CPU, jobs=1, show=lines.append)
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
        (["--out", "nowhere/runs.csv"], "--out: 'nowhere' does not exist"),
    ],
)
def test_bad_arguments_name_themselves(arguments, problem, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *arguments])
    assert exit_.value.code == 2
    assert problem in capsys.readouterr().err
