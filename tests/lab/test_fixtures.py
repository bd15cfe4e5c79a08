"""Sweep files of earlier commits stay usable: their runs are recognised, and the transfer analysis reads them."""

import shutil
from pathlib import Path

import pytest

from lwadamw.commands import main
from lwadamw.lab import outcomes
from lwadamw.lab import sweep as sweeps
from lwadamw.lab.transfer import analyse
from tests.fixtures.write import SWEEP

FIXTURE = Path(__file__).parents[1] / "fixtures" / "1c3fdde"
COMMAND = ["sweep", *SWEEP.split(), "--data", "text.txt", "--out", "sweep.csv", "--device", "cpu"]


@pytest.fixture
def made(monkeypatch):
    """The tasks that a sweep hands to its processes. The processes are left out."""
    tasks = []

    def run_all(work, todo, *args, **kwargs):
        tasks.extend(todo)
        return iter(())

    monkeypatch.setattr(sweeps, "run_all", run_all)
    return tasks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the fixture, as the current folder."""
    for name in ("sweep.csv", "text.txt"):
        shutil.copy(FIXTURE / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_same_sweep_adds_no_run_to_the_file_of_an_earlier_commit(folder, made, capsys):
    before = (folder / "sweep.csv").read_bytes()
    assert main(COMMAND) == 0
    assert "sweep.csv: 4 runs there, 0 to make" in capsys.readouterr().out
    assert made == []
    assert (folder / "sweep.csv").read_bytes() == before


def test_a_run_that_the_file_lacks_is_made(folder, made, capsys):
    lines = (folder / "sweep.csv").read_text().splitlines(keepends=True)
    (folder / "sweep.csv").write_text("".join(lines[:-1]))
    assert main(COMMAND) == 0
    assert "sweep.csv: 3 runs there, 1 to make" in capsys.readouterr().out
    assert [(task.arm, task.width, task.lr, task.seed) for task in made] == [("mup", 64, 0.02, 0)]


def test_the_transfer_analysis_reads_the_file_of_an_earlier_commit():
    found = outcomes.read(FIXTURE / "sweep.csv")
    assert [(row.arm, row.width, row.lr, row.weight_decay, row.seed) for row in found.rows] == [
        ("mup", width, lr, 0.5, "0") for width in (32, 64) for lr in (0.01, 0.02)
    ]
    (arm,) = analyse(found.rows).arms
    assert [(o.width, o.best_lr) for o in arm.optima] == [(32, 0.02), (64, 0.02)]
    assert [o.best_loss for o in arm.optima] == pytest.approx([0.5514677381142974, 0.4080747961997986], rel=1e-12)
