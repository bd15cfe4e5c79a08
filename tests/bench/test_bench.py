"""The benchmark commands run on a machine without a GPU, print a table and write a complete record."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench import harness, host, memory, peers, step, train
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES
from tests.bench.commands import start

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
COMMANDS = (
    "step",
    "host",
    "codegen",
    "memory",
    "scale",
    "train",
    "monitor",
    "gpu_tests",
    "gpu_bench",
    "predict",
    "tune",
    "report",
)
# These peers take part in a few storage combinations only. In all others they are left out without a reason.
OF_FEW_STORAGES = {peers.PEERS[key][0] for key in ("fused_mixed", "fused_copies", "flashoptim")}
IN_GIT = harness.output("git", "rev-parse", "HEAD") is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_is_a_command_with_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"bench.{name}", "--help"])
    # runpy warns that the module is in sys.modules already.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    assert exit_.value.code == 0
    assert f"python -m bench.{name}" in capsys.readouterr().out


def test_step_lists_every_peer_or_the_reason_why_it_is_missing(run, tmp_path):
    (one, *_, many) = run(step, "--dry-run", json_to=tmp_path / "step.json")["results"]
    assert (one["groups"], many["groups"]) == (1, 4)
    titles = {title for title, _ in peers.PEERS.values()} - OF_FEW_STORAGES
    for result in (one, many):
        assert titles == titles & (result["rows"].keys() | result["missing"].keys())
    assert "torch fused, one group" in many["rows"]
    row = many["rows"]["lwadamw"]
    assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
    assert many["rows"][peers.FUSED]["vs_fused"] == 1


@pytest.mark.usefixtures("base_is_forgotten")
def test_host_has_a_column_per_grouping_and_rows_of_another_revision(run, tmp_path):
    base = ["--base", "HEAD"] if IN_GIT else []
    record = run(host, "--dry-run", *base, json_to=tmp_path / "host.json")
    assert [column["groups"] for column in record["columns"]] == [1, 28, 30]
    labels = ("lwadamw", "lwadamw at HEAD") if IN_GIT else ("lwadamw",)
    ours = {label + variant for label in labels for variant in host.VARIANTS} | {"lwadamw, DTensors"}
    for column in record["columns"]:
        assert set(column["us"]) == {host.FUSED, "torch fused, steps too", "torch fused, DTensors", *ours}
        assert all(time["p50"] > 0 for time in column["us"].values())


def test_memory_compares_every_contestant_with_the_limit(run, tmp_path):
    (result,) = run(memory, "--dry-run", "--workloads", "cpu_30m", json_to=tmp_path / "memory.json")["results"]
    assert {"lwadamw", "lwadamw, torch backend", peers.FUSED, "torch foreach"} <= result["rows"].keys()
    for row in result["rows"].values():
        assert row["within"] == (max(row["first"], row["step"]) <= result["limit"])


@pytest.mark.usefixtures("short_text")
def test_train_trains_one_model_with_every_optimizer(run, tmp_path):
    rows = run(train, "--dry-run", json_to=tmp_path / "train.json")["rows"]
    losses = {name: row["loss"] for name, row in rows.items()}
    unclipped = [losses[name] for name in ("lwadamw", "lwadamw, norms read every step", peers.FUSED, "torch foreach")]
    clipped = [losses["lwadamw, clipping, norms read every step"], losses["usual way: clip_grad_norm_, fused, norms"]]
    assert max(unclipped) - min(unclipped) < 1e-3
    assert max(clipped) - min(clipped) < 1e-3


def test_step_measures_every_storage_combination(run, tmp_path):
    arguments = ("--dry-run", "--workloads", "cpu_30m", "--storage", "all", "--groups", "1")
    results = run(step, *arguments, json_to=tmp_path / "step.json")["results"]
    assert [r["storage"] for r in results] == list(COMBINATIONS)
    titles = {title for title, _ in peers.PEERS.values()} - OF_FEW_STORAGES
    for result in results:
        assert titles == titles & (result["rows"].keys() | result["missing"].keys())
        storage = COMBINATIONS[result["storage"]].storage
        least, own = storage.moved_bytes(), result["rows"]["lwadamw"]["bytes"] / result["elements"]
        # With 8-bit moments, small tensors keep float32 moments, so the mean is above the least.
        assert own == least or (storage.exp_avg in CODES and least < own < least + 1)
        assert result["rows"]["lwadamw, clipping"]["bytes"] / result["elements"] == own + storage.grad.itemsize


def test_an_unknown_storage_is_an_error_that_names_the_known_ones():
    done = start("bench.step", "--dry-run", "--storage", "int3")
    assert done.returncode == 2
    assert "'int3' not in 'fp32', " in done.stderr
