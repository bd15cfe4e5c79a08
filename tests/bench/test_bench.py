"""The benchmark commands run on a machine without a GPU, print a table and write a complete record."""

import gc
import importlib
import inspect
import json
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench import gpu, harness, host, memory, peers, step, train, tune
from lwadamw.lab import data
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
COMMANDS = ("step", "host", "codegen", "memory", "scale", "train", "monitor", "gpu", "tune", "report")
# These peers take part in a few storage combinations only. In all others they are left out without a reason.
OF_FEW_STORAGES = {peers.PEERS[key][0] for key in ("fused_mixed", "fused_copies")}
IN_GIT = harness.output("git", "rev-parse", "HEAD") is not None


def _start(*arguments):
    """Run `python -m ...` in a process of its own, with interpreted kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a benchmark with a command line. It returns the printed lines, or the JSON record if asked for.

    The command runs in this process, because a new process needs several seconds to import torch. On a machine with a GPU it
    runs in a new process, because the kernels of this process are compiled and dry runs on the CPU need interpreted ones.
    """

    def run_(module, *arguments, json_to=None):
        arguments = [*arguments, *(["--json", str(json_to)] if json_to else [])]
        if torch.cuda.is_available():
            done = _start(module.__name__, *arguments)
            assert done.returncode == 0, done.stdout + done.stderr
            printed = done.stdout
        else:
            monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
            monkeypatch.setitem(step.TURN, CPU.type, 0.0)  # A turn is one step, because no test reads the times.
            capsys.readouterr()
            gc.freeze()  # The benchmarks collect garbage often, and the heap of the test process is large.
            try:
                module.main()
            finally:
                gc.unfreeze()
            printed = capsys.readouterr().out
        lines = printed.splitlines()
        assert any(line.startswith("| --") for line in lines), "no table"
        if json_to is None:
            return lines
        record = json.loads(json_to.read_text())
        assert {"device", "driver", "torch", "triton", "python", "commit", "date"} <= record["machine"].keys()
        assert record["command"].startswith(f"python -m {module.__name__} --dry-run")
        return record

    return run_


@pytest.fixture
def short_text(monkeypatch):
    """Benchmarks that train a model read a short text instead of the whole standard library."""
    corpus = data.Corpus(*data.split_files([b"a text of a few words to train on. " * 20] * 16), source="test")
    monkeypatch.setattr(data, "standard_library", lambda: corpus)


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


@pytest.mark.usefixtures("short_text")
def test_the_dry_run_of_gpu_writes_the_same_parts_as_a_run_on_a_gpu(run, tmp_path):
    lines = run(gpu, "--dry-run", "--out", str(tmp_path), "--workloads", "one_huge")
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["errors"] == {}
    assert [r["workload"] for r in record["step"]] == ["one_huge"]
    assert ["fp32", *(r["storage"] for r in record["storage"])] == list(COMBINATIONS)
    assert {"host", "memory", "train", "monitor"} <= record.keys()
    assert [r["width"] for r in record["monitor"]] == [32]
    assert "clip+norms vs usual" in "\n".join(lines)


def test_every_test_file_that_gpu_runs_exists(monkeypatch):
    started = []

    def record(command, **_):
        started.extend(command)
        return subprocess.CompletedProcess(command, 0, stdout="1 passed", stderr="")

    monkeypatch.setattr(subprocess, "run", record)
    assert gpu.run_suite(1.0) == "1 passed"
    files = [argument for argument in started if argument.startswith("tests/")]
    assert len(files) == len(gpu.SUITE) > 0
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_every_test_function_that_gpu_runs_takes_no_arguments():
    """bench.gpu calls these functions without pytest, so no fixture can be filled in."""
    tests = gpu.gpu_tests()
    assert {test.__module__ for test in tests} == {"tests.kernels.test_gpu", "tests.kernels.test_gpu_storage"}
    assert [test.__name__ for test in tests if inspect.signature(test).parameters] == []


def test_gpu_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])
    with pytest.raises(SystemExit, match="sees no GPU"):
        gpu.main()


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
    done = _start("bench.step", "--dry-run", "--storage", "int3")
    assert done.returncode == 2
    assert "'int3' not in 'fp32', " in done.stderr


def test_tune_replaces_constants_of_the_layout(run, tmp_path):
    record = run(tune, "--dry-run", "--workloads", "one_huge", "--only", "block 2048", json_to=tmp_path / "tune.json")
    assert set(record["results"][0]["rows"]) == {
        "as it is", "as it is, clipping", "block 2048", "block 2048, clipping",
    }  # fmt: skip
    package = tune.variant({"BLOCK": 2048}).__name__
    assert importlib.import_module(f"{package}.kernels.layout").BLOCK == 2048
    with pytest.raises(ValueError, match="defines no constant BLOK"):
        tune.variant({"BLOK": 2048})
