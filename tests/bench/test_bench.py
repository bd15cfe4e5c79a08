"""The benchmark commands run on a machine without a GPU, print a table and count the right things."""

import gc
import importlib
import inspect
import json
import os
import runpy
import subprocess
import sys
import types
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import lwadamw
from bench import gpu, harness, host, memory, peers, report, revision, step, train, tune, workloads
from lwadamw.lab import data
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES
from lwadamw.step.engine import Engine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
COMMANDS = ("step", "host", "codegen", "memory", "train", "monitor", "gpu", "tune", "report")
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


@pytest.fixture
def base_is_forgotten():
    """The package of another revision is removed from sys.modules after the test, so that the next test can load one."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == revision.NAME]:
        del sys.modules[name]


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
    ours = {label + variant for label in labels for variant in host.VARIANTS}
    for column in record["columns"]:
        assert set(column["us"]) == {host.FUSED, "torch fused, steps too", *ours}
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


def test_every_workload_has_the_tensors_and_elements_of_its_model():
    counts = {name: (len(w.shapes), w.elements) for name, w in workloads.WORKLOADS.items()}
    assert counts["gpt2_124m"] == (148, 124_439_808)
    assert counts["llama_1b"] == (146, 1_235_814_400)
    assert counts["llama_7b_shard"][1] == 6_738_415_616 // 8
    assert counts["vit_465"][0] == 465
    assert counts["many_small"] == (10_000, 640_000)
    assert counts["one_huge"] == (1, 2**30)
    assert abs(counts["cpu_30m"][1] / 30e6 - 1) < 0.01
    assert counts["efficientnet_b5"] == (506, 30_389_784)
    assert workloads.WORKLOADS["llama_1b"].counts() == [1, 28, 146]
    assert workloads.WORKLOADS["vit_465"].counts() == [28, 465]
    assert workloads.WORKLOADS["one_huge"].counts(28) == [1]


def test_groups_hold_every_parameter_once_in_at_most_28_settings():
    params = [torch.zeros(1) for _ in range(100)]
    groups = workloads.make_groups(params, 60)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, params))
    assert len({g["lr"] for g in groups}) == 28


def test_quantiles_interpolate():
    assert harness.quantiles([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert harness.quantiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_a_ratio_compares_within_rounds():
    """A machine that slows down in the middle of a measurement does not change a ratio."""
    times = {"fast": [1.0, 1.0, 10.0], "slow": [2.0, 2.0, 20.0]}
    assert harness.ratio(times, "fast", "slow") == 2.0


def test_every_contestant_runs_in_every_round():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = harness.interleaved(harness.Timer(CPU, steps=4, seconds=1e-9), calls, rounds=5)
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    # Three calls warm up. Then there is one call per round, because one call takes longer than the time asked for.
    assert seen.count("a") == 3 + 5


def test_bytes_per_element_are_the_bytes_of_each_algorithm():
    workload = workloads.WORKLOADS["cpu_30m"].shrunk()
    rows = step.measure(workload, 1, CPU, backend="torch", wanted=["foreach", "usual"], rounds=1)["rows"]
    per_element = {name: row["bytes"] / workload.elements for name, row in rows.items()}
    assert per_element["lwadamw"] == per_element[peers.FUSED] == 4 * 4 + 3 * 4
    assert per_element["lwadamw, clipping"] == 32
    assert per_element["usual way: clip_grad_norm_, fused, norms"] == 28 + 12 + 8


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


def test_contestants_step_parameters_of_their_own_over_the_same_memory():
    """Every optimizer has its own Parameter objects over the same memory.

    If another optimizer stepped the same Parameter object, lwadamw would have to compare it with its master weight. That
    comparison is no part of a normal step, so it must not be timed.
    """
    shapes = workloads.WORKLOADS["cpu_30m"].shrunk()
    field = peers.Field(workloads.make_params(shapes, CPU, torch.bfloat16), 2, "bf16, master")
    first, second, *_ = peers.ours(field, lwadamw, "torch").values()
    held = [[p for g in c.optimizer.param_groups for p in g["params"]] for c in (first, second)]
    assert {p.data_ptr() for p in held[0]} == {p.data_ptr() for p in held[1]} == {p.data_ptr() for p in field.params}
    versions = [p._version for p in held[1]]
    first.step()
    assert versions == [p._version for p in held[1]]
    assert all(p._version > version for p, version in zip(held[0], versions, strict=True))


def test_a_step_of_a_contestant_leaves_moments_unverified(monkeypatch):
    """The benchmark hands shared moments to lwadamw. That must not make lwadamw verify every moment at every step.

    A plain training loop never pays for this verification, so it must not be timed.
    """
    verified, step_of_engine = [], Engine.step

    def spy(*args, verify_state, **options):
        verified.append(verify_state)
        return step_of_engine(*args, verify_state=verify_state, **options)

    monkeypatch.setattr(Engine, "step", spy)
    field = peers.Field(workloads.make_params(workloads.WORKLOADS["cpu_30m"].shrunk(), CPU), 2)
    entered = peers.ours(field, lwadamw, "triton")["lwadamw"]
    entered.step()
    assert verified == [False]
    state = entered.optimizer.state[entered.optimizer.param_groups[0]["params"][0]]
    assert state["exp_avg"] is field.moments[0]["exp_avg"]
    assert float(state["step"]) == 2
    entered.step()
    assert verified == [False, True]  # The test has read `optimizer.state` in between.


def test_memory_counts_bytes_that_stay_and_bytes_that_are_freed():
    params = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(3)]
    kept = []

    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            kept.append(torch.zeros(100))  # 400 bytes that stay
            torch.zeros(2500)  # 10,000 bytes that are freed

    measured = memory.measure_optimizer(params, lambda: Greedy(params, lr=1.0), memory.plain)
    assert measured == {"first": 10_400, "step": 400 + 400 + 10_000}


def test_memory_of_a_real_step_is_the_memory_of_its_tables():
    params, moments, move = memory.untouched(workloads.Workload("three", [(5000,), (3, 7), (1,)], (1,)))
    made = []

    def make():
        made.append(lwadamw.AdamW(params, backend="triton"))
        return made[0]

    with host.stubbed_kernels():
        measured = memory.measure_optimizer(params, make, memory.plain, moments=moments, move=move)
    buffer = params[0].untyped_storage().data_ptr()
    tables = [t for t in _tensors(made[0]) if t.untyped_storage().data_ptr() != buffer]
    # The steps of the parameters are state, 4 bytes each. The table of groups is one row of 16 words on the host.
    assert 0 <= measured["step"] - (memory.storage_bytes(tables) - 4 * len(params)) <= 16 * 8 + 64


def _tensors(thing, seen=None):
    """Every tensor that an object holds in its attributes, lists, tuples and dicts, at any depth."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, (list, tuple, set)):
        held = list(thing)
    elif isinstance(thing, dict):
        held = list(thing.values())
    else:
        slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        held = [*slots, *vars(thing).values()] if hasattr(thing, "__dict__") else slots
    return [t for item in held for t in _tensors(item, seen)]


@pytest.mark.skipif(not IN_GIT, reason="needs the repository")
@pytest.mark.usefixtures("base_is_forgotten")
def test_the_base_revision_is_another_package_and_takes_part():
    base = revision.load("HEAD")
    assert base.__name__ == "lwadamw_base"
    folder = os.path.dirname(os.path.dirname(base.__file__))
    assert not folder.startswith(str(ROOT))
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = base.AdamW([p], lr=0.5, weight_decay=0.0, backend="triton")
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((5,), 0.5))
    assert sys.modules["lwadamw_base.kernels"].__file__.startswith(folder)
    assert not isinstance(optimizer, lwadamw.AdamW)

    small = workloads.Workload("small", [(4, 5), (3,)], (1,))
    rows = step.measure(small, 1, CPU, backend="torch", wanted=[], rounds=1, base=("HEAD", base))["rows"]
    assert {"lwadamw", "lwadamw, clipping", "lwadamw at HEAD", "lwadamw at HEAD, clipping"} <= rows.keys()


def test_base_without_git_or_revision_is_a_clear_error(monkeypatch):
    if IN_GIT:
        with pytest.raises(RuntimeError, match=r"--base no-such-thing: git archive failed"):
            revision.load("no-such-thing")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs git"):
        revision.load("HEAD")


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("LWADAMW_COMMIT", "abc")
    assert harness.commit() == "abc"
    monkeypatch.delenv("LWADAMW_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert harness.commit() == "unknown"


def test_the_readme_shows_the_committed_results():
    assert report.out_of_date(report.build(ROOT / "bench/results"), ROOT) == []


def test_report_of_a_gpu_run(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"ms": {"p50": 2.0}, "of_copy": 0.9, "vs_fused": 1.5}
    rows = dict.fromkeys((report.OURS, report.CLIPPED, report.USUAL, peers.FUSED), row)
    result = {"workload": "one_huge", "tensors": 1, "elements": 2**30, "groups": 1, "rows": rows}
    machine = {"device": "Some GPU", "driver": "1", "commit": "abc", "date": "2026-01-01"}
    results = tmp_path / "bench/results"
    results.mkdir(parents=True)
    record = {"command": "python -m bench.gpu", "machine": machine, "step": [result]}
    (results / "gpu_some_gpu.json").write_text(json.dumps(record))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    built = report.build(results)
    assert report.out_of_date(built, tmp_path) == ["README.md", "docs/performance.svg"]
    report.main(["--root", str(tmp_path)])
    assert report.out_of_date(report.build(results), tmp_path) == []
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "Some GPU" in text
    ElementTree.parse(tmp_path / "docs/performance.svg")
    result["rows"] = {**rows, report.OURS: {**row, "of_copy": 0.8}}
    (results / "gpu_some_gpu.json").write_text(json.dumps(record))
    assert report.out_of_date(report.build(results), tmp_path) == ["README.md", "docs/performance.svg"]


def test_tune_replaces_constants_of_the_layout(run, tmp_path):
    record = run(tune, "--dry-run", "--workloads", "one_huge", "--only", "block 2048", json_to=tmp_path / "tune.json")
    assert set(record["results"][0]["rows"]) == {
        "as it is", "as it is, clipping", "block 2048", "block 2048, clipping",
    }  # fmt: skip
    package = tune.variant({"BLOCK": 2048}).__name__
    assert importlib.import_module(f"{package}.kernels.layout").BLOCK == 2048
    with pytest.raises(ValueError, match="defines no constant BLOK"):
        tune.variant({"BLOK": 2048})
