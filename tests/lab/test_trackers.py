"""What sweeps write for trackers, transfer reads back: the table that W&B exports, and event files of TensorBoard."""

import csv
import sys
from pathlib import Path

import pytest

from lwadamw.commands import main
from lwadamw.lab import outcomes, trackers

DATA = Path(__file__).parents[2] / "docs" / "data"
SWEEP = ["sweep", "--mini", "--arms", "fan2025", "--widths", "32", "--seeds", "1", "--steps", "2", "--context", "8"]


@pytest.fixture
def runs(tmp_path):
    """Twelve runs of a real sweep, one of which diverged."""
    with (DATA / "transfer.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    chosen = [line for line in lines if line[header.index("width")] in ("64", "256")][::10]
    chosen[0][header.index("loss")], chosen[0][header.index("status")] = "", "diverged"
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *chosen])
    return path


def test_transfer_reads_from_the_table_of_wandb_what_the_sweep_wrote(runs, tmp_path):
    out = tmp_path / "wandb.csv"
    before = outcomes.read(runs)
    assert trackers.wandb(runs, out) == len(before.rows) > 10
    after = outcomes.read(out)
    assert after.rows == before.rows
    assert (after.loss, after.caption) == ("val/loss", before.caption)
    assert sum(row.loss == float("inf") for row in after.rows) == 1
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:3] == ["Name", "State", "arm"]
    assert {line["State"] for line in lines} == {"finished"}
    assert len({line["Name"] for line in lines}) == len(lines)


def test_transfer_reads_from_event_files_what_the_sweep_wrote(runs, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "events"
    before = outcomes.read(runs)
    assert trackers.tensorboard(runs, out) == len(before.rows)
    assert trackers.tensorboard(runs, out) == 0, "written twice"
    found = outcomes.read(out)
    after = {(r.arm, r.width, r.lr, r.weight_decay, r.seed): r.loss for r in found.rows}
    assert after == pytest.approx(
        {(r.arm, r.width, r.lr, r.weight_decay, r.seed): r.loss for r in before.rows}, rel=1e-6
    )
    assert found.loss == "val/loss"
    assert main(["transfer", str(out)]) == 0


def test_without_tensorboard_nothing_is_trained_and_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in ("tensorboard", "tensorboard.backend.event_processing.event_accumulator"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.chdir(tmp_path)
    for command in (SWEEP, ["scaling"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--tensorboard"])
        assert stopped.value.code == 2
        assert "argument --tensorboard: event files" in (said := capsys.readouterr().err)
        assert "pip install tensorboard" in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.out.tfevents.1").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install tensorboard"):
        outcomes.read(tmp_path)


def test_a_folder_without_runs_and_a_file_without_results_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="the folder has no event files of TensorBoard"):
        outcomes.read(tmp_path)
    with pytest.raises(ValueError, match=r"series\.csv: it has no columns 'loss' and 'status'"):
        trackers.wandb(DATA / "series.csv", tmp_path / "out.csv")
    with pytest.raises(SystemExit):
        main([*SWEEP, "--series", "--wandb"])
    assert "argument --series: it writes no results" in capsys.readouterr().err


@pytest.mark.matrix
def test_a_sweep_writes_the_table_next_to_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SWEEP, "--wandb", "--jobs", "1", "--lr", "0.01", "0.02", "--plot", "x.svg"]) == 0
    assert outcomes.read(tmp_path / "sweep_wandb.csv").rows == outcomes.read(tmp_path / "sweep.csv").rows
