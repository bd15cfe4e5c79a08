"""The three commands for a machine with a GPU: what they start, what they report, and that one failure hides no other."""

import importlib
import inspect
import json
import subprocess
import sys
import time
import types
import unittest

import pytest
import torch

from bench import goals, gpu_bench, gpu_state, gpu_tests, harness, peers, tune
from bench.gpu_tests import Job
from lwadamw.kernels import layout
from lwadamw.state.combinations import COMBINATIONS
from tests.bench.commands import ROOT

LONG = 30  # lines that a table may have at most


def _job(code, part="suite", **options):
    return Job(part, options.pop("name", "a process"), [sys.executable, "-c", code], **options)


@pytest.mark.usefixtures("short_text")
def test_the_dry_run_of_gpu_bench_writes_the_same_parts_as_a_run_on_a_gpu(run, tmp_path):
    lines = run(gpu_bench, "--dry-run", "--out", str(tmp_path), "--workloads", "one_huge")
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert record["errors"] == {}
    assert record["left_out"] == []
    assert [r["workload"] for r in record["step"]] == ["one_huge"]
    assert {"fp32", *(r["storage"] for r in record["storage"])} == COMBINATIONS.keys()
    assert {"host", "memory", "train", "monitor"} <= record.keys()
    assert [r["width"] for r in record["monitor"]] == [32]
    assert "clip+norms vs usual" in "\n".join(lines)
    assert list(tmp_path.iterdir()) == [path]


def test_the_units_of_gpu_bench_that_answer_the_goals_come_first_and_every_unit_once():
    units = gpu_bench.units(torch.device("cpu"), gpu_bench.ALL, dry=False)
    names = [(unit.part, unit.name.partition(":")[0], unit.name.partition("groups: ")[2]) for unit in units]
    assert names[:9] == [
        *(("step", "llama_1b", n) for n in ("1", "28", "146")),
        ("step", "one_huge", "1"),
        *(("step", "vit_465", n) for n in ("28", "465")),
        *(("storage", name, "") for name in goals.CODED),
    ]
    assert len(set(names)) == len(names)
    assert {name for part, name, _ in names if part == "step"} == set(gpu_bench.ALL)
    assert {"fp32", *(name for part, name, _ in names if part == "storage")} == COMBINATIONS.keys()
    assert {part for part, *_ in names} == set(gpu_bench.PARTS)


def test_a_unit_that_fails_is_recorded_and_the_others_are_measured(monkeypatch, capsys, tmp_path):
    def fails():
        raise ArithmeticError("no such memory")

    units = [
        gpu_bench.Unit("step", "a", fails),
        gpu_bench.Unit("step", "b", list),
        gpu_bench.Unit("monitor", "monitor", lambda: [{"width": 3, "share": 0.5}]),
    ]
    monkeypatch.setattr(gpu_bench, "units", lambda *_: units)
    monkeypatch.setattr(sys, "argv", ["bench.gpu_bench", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_bench.main()
    record = json.loads((tmp_path / "dry_run.json").read_text())
    assert record["errors"] == {"step: a": "ArithmeticError: no such memory"}
    assert record["monitor"] == [{"width": 3, "share": 0.5}]
    assert list(record["states"]) == ["before", "step: a", "step: b", "monitor"]
    assert "width 3 50.00%" in capsys.readouterr().out


def test_gpu_bench_ends_at_its_limit_in_the_middle_of_a_unit_and_says_what_is_left(tmp_path):
    code = """
import sys, time
from bench import gpu_bench
hangs = gpu_bench.Unit("step", "b", lambda: time.sleep(600))
done = gpu_bench.Unit("monitor", "monitor", lambda: [{"width": 3, "share": 0.5}])
gpu_bench.units = lambda *_: [done, hangs, gpu_bench.Unit("train", "train", dict)]
sys.argv = ["bench.gpu_bench", "--dry-run", "--minutes", "0.05", "--out", sys.argv[1]]
gpu_bench.main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "dry_run.json").read_text())
    assert record["left_out"] == ["step: b", "train"]
    assert record["monitor"] == [{"width": 3, "share": 0.5}]
    assert "no time left for step: b; train" in ended.stdout


def _step(workload, groups, ours=1.0, **others):
    named = {"off": goals.OFF, "clipped": goals.CLIPPED, "usual": goals.USUAL}
    rows = {name: {"ms": {"p50": others[key]}} for key, name in named.items() if key in others}
    rows["lwadamw"] = {
        "ms": {"p50": ours},
        "of_copy": others.get("of_copy", 0.95),
        "vs_fused": others.get("vs_fused", 1.2),
    }
    return {"workload": workload, "groups": groups, "tensors": 146, "storage": "fp32", "rows": rows}


def test_every_goal_says_what_was_measured_and_whether_it_is_met():
    record = {
        "step": [
            _step("llama_1b", 1, 8.0, off=7.9, clipped=10.0, usual=17.9),
            _step("llama_1b", 146, 8.2, off=8.2),
            _step("one_huge", 1, 7.0, off=7.0, clipped=8.0, usual=16.0, of_copy=0.919, vs_fused=1.1),
            _step("vit_465", 465, 2.0, off=1.9),
        ],
        "storage": [{"storage": name, "rows": {"lwadamw": {"ms": {"p50": 5.0}}}} for name in ("bf16", *goals.CODED)],
    }
    assert [goal.line() for goal in goals.goals(record)] == [
        "MISSED: at least 92 % of a copy: llama_1b 95.0%, one_huge 91.9%",
        "met: at least 1.10x torch fused: llama_1b 1.20x, one_huge 1.10x",
        "met: regrouping changes the time by at most 3 %: llama_1b in 146 +2.5%",
        "MISSED: norms cost at most 2 %: llama_1b in 1 +1.3%, llama_1b in 146 +0.0%, one_huge in 1 +0.0%, vit_465 in 465 +5.3%",
        "MISSED: clip, step and norms at least 1.8x the usual way: llama_1b 1.79x, one_huge 2.00x",
        "met: 8-bit moments at least 1.5x the speed of fp32: " + ", ".join(f"{name} 1.60x" for name in goals.CODED),
    ]
    assert {goal.line().partition(":")[0] for goal in goals.goals({})} == {"not measured"}


def test_the_summary_of_all_units_has_at_most_thirty_lines():
    row = {"ms": {"p50": 1.0}, "of_copy": 0.9, "vs_fused": 1.2}
    step = {"workload": "llama_1b", "groups": 1, "tensors": 146, "storage": "fp32", "rows": {"lwadamw": row}}
    us = {name: {"p50": 1.0} for name in ("lwadamw", "torch fused", "torch fused, launched", "lwadamw, launched")}
    record = {
        "step": [step] * 10,
        "storage": [{**step, "storage": name} for name in COMBINATIONS if name != "fp32"],
        "host": {"columns": [{"groups": n, "us": us} for n in (1, 28, 500)]},
        "memory": [{"workload": "llama_1b", "rows": {"lwadamw": {"within": True}}}] * 7,
        "compile": [{**step, "rows": {peers.PEERS["compile"][0]: row}}, {**step, "workload": "one_huge", "rows": {}}],
        "train": {"rows": {"lwadamw": {"tokens_per_second": {"p50": 1.0}}}},
        "monitor": [{"width": 1, "share": 0.0}],
        "errors": {"a": "b"},
        "left_out": ["c"],
    }
    summary = gpu_bench.summary(record)
    assert summary.count("\n") + 2 <= LONG  # and a line for the machine
    for storage in record["storage"]:
        assert f"{storage['storage']}: 1.000 ms" in summary
    assert "torch.compile of foreach, vs fused: llama_1b 1.20x, one_huge failed" in summary


def test_the_dry_run_of_gpu_test_starts_every_kind_of_process(monkeypatch, capsys, tmp_path):
    arguments = ["--dry-run", "--out", str(tmp_path), "--files", "state/test_codes.py"]
    monkeypatch.setattr(sys, "argv", ["bench.gpu_tests", *arguments])
    gpu_tests.main()
    (path,) = tmp_path.iterdir()
    found = {job["part"]: job for job in json.loads(path.read_text())["jobs"]}
    assert {part: job["outcome"] for part, job in found.items()} == dict.fromkeys(gpu_tests.PARTS, "passed")
    assert found["functions"]["last"] == f"{len(gpu_tests.gpu_tests())} passed, 0 failed"
    assert found["sanitizer"]["last"] == "1 storages stepped on cpu"
    assert "suite: 1 passed of 1 processes" in capsys.readouterr().out


def test_every_function_is_in_one_process_and_every_file_exists():
    jobs = gpu_tests.jobs(gpu_tests.PARTS, gpu_tests.SUITE, dry=False)
    functions = [name for job in jobs if job.part == "functions" for name in job.command if "::" in name]
    assert sorted(functions) == sorted(gpu_tests.gpu_tests())
    files = [argument for job in jobs for argument in job.command if argument.startswith("tests/")]
    assert len(files) == len(gpu_tests.SUITE)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert {job.name for job in jobs if job.part == "sanitizer"} == set(gpu_tests.SANITIZERS)


def test_every_test_function_that_gpu_test_runs_takes_no_arguments():
    """bench.gpu_tests calls these functions without pytest, so no fixture can be filled in."""
    tests = gpu_tests.gpu_tests()
    assert {test.__module__ for test in tests.values()} == {"tests.kernels.test_gpu", "tests.kernels.test_gpu_storage"}
    assert [name for name, test in tests.items() if inspect.signature(test).parameters] == []


def test_a_function_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def fails():
        raise ValueError("3 is not 4\nand more")

    def cannot():
        raise unittest.SkipTest("needs two GPUs")

    tests = {"a.py::one": fails, "a.py::two": lambda: None, "a.py::three": cannot}
    monkeypatch.setattr(gpu_tests, "gpu_tests", lambda: tests)
    assert gpu_tests.run_functions(list(tests), dry=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED a.py::one - ValueError: 3 is not 4"
    assert lines[1].startswith("passed a.py::two")
    assert lines[2:] == ["skipped a.py::three - needs two GPUs", "1 passed, 1 failed, 1 skipped"]


def test_a_function_that_the_machine_cannot_run_is_in_the_table():
    job = _job("print('skipped t.py::x - needs two GPUs\\n1 passed, 0 failed, 1 skipped')").run(time.monotonic() + 60)
    assert (job.outcome, job.skipped) == ("passed", [("t.py::x", "needs two GPUs")])
    assert gpu_tests.table([job]).splitlines()[-1] == "skipped t.py::x: needs two GPUs"


@pytest.mark.parametrize(
    ("code", "outcome", "failures"),
    [
        ("print('2 passed')", "passed", []),
        ("import os; os._exit(3)", "FAILED", [("a process", "nothing was printed")]),
        ("print('FAILED t.py::x - E: 1\\n1 failed'); exit(1)", "FAILED", [("t.py::x", "E: 1")]),
        (
            "import time; print('FAILED t.py::x - E: 1', flush=True); time.sleep(60)",
            "not finished",
            [("t.py::x", "E: 1")],
        ),
        (
            "import time; print('t.py::x[a, b] FAILED  [ 5%]\\nt.py::y PASSED [ 6%]', flush=True); time.sleep(60)",
            "not finished",
            [("t.py::x[a, b]", "see the log")],
        ),
        (
            "print('t.py::x[a, b] FAILED [9%]\\nFAILED t.py::x[a, b] - E: 1'); exit(1)",
            "FAILED",
            [("t.py::x[a, b]", "E: 1")],
        ),
    ],
)
def test_a_process_is_reported_whether_it_ends_crashes_or_hangs(code, outcome, failures):
    job = _job(code).run(time.monotonic() + (3 if outcome == "not finished" else 60))
    assert (job.outcome, job.failures) == (outcome, failures)


def test_a_process_is_ended_with_the_processes_that_it_started():
    """compute-sanitizer starts the program as another process, which holds the pipe open and uses the GPU."""
    inner = "import time; print('inner runs', flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    begin = time.monotonic()
    job = _job(code).run(begin + 5)
    assert time.monotonic() - begin < 60
    assert (job.outcome, job.last) == ("not finished", "inner runs")


def test_processes_that_cannot_run_say_why():
    late = _job("print(1)").run(time.monotonic() - 1)
    missing = _job("print(1)", last="pytest is not installed").run(time.monotonic() + 60)
    assert [(job.outcome, job.last) for job in (late, missing)] == [
        ("not run", "no time left"),
        ("not run", "pytest is not installed"),
    ]
    assert gpu_tests.table([late, missing]) == "suite: 2 not run of 2 processes: no time left; pytest is not installed"


def test_the_table_of_gpu_test_names_failures_of_every_part_in_at_most_thirty_lines():
    jobs = [
        _job("", part, outcome="FAILED", failures=[(f"{part} {i}", "E") for i in range(30)]) for part in gpu_tests.PARTS
    ]
    table = gpu_tests.table(jobs)
    assert table.count("\n") + 2 <= LONG
    assert f"and {90 - gpu_tests.ROWS} more" in table
    assert all(f"{part}: 1 FAILED of 1 processes" in table for part in gpu_tests.PARTS)


def test_processes_keep_the_python_path_of_carried_wheels(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/carried/wheels")
    job = _job("import os; print(os.environ['PYTHONPATH'])").run(time.monotonic() + 60)
    assert job.last == ".:/carried/wheels"


@pytest.mark.parametrize("module", [gpu_bench, gpu_tests])
def test_gpu_commands_without_a_gpu_say_so(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__])
    with pytest.raises(SystemExit, match="sees no GPU"):
        module.main()


def _answers(monkeypatch, *answers):
    """Let nvidia-smi give these answers, and the last one again and again."""
    left = list(answers)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(harness, "output", lambda *_: left.pop(0) if left[1:] else left[0])


def test_the_state_of_a_gpu_is_read_by_name(monkeypatch):
    _answers(monkeypatch, None, "1980 MHz, 1980 MHz, 3201 MHz, 3201 MHz, 120 W, 700 W, 40, 0x4")
    state = gpu_state.read(torch.device("cuda"))
    assert (state["clocks.sm"], state["power.limit"]) == ("1980 MHz", "700 W")
    assert state["clocks_event_reasons.active"] == "0x4"
    assert gpu_state.read(torch.device("cpu")) == {}
    _answers(monkeypatch, None)
    assert gpu_state.read(torch.device("cuda")) == {"nvidia-smi": "no answer"}


def test_a_gpu_is_watched_while_it_works(monkeypatch):
    monkeypatch.setattr(gpu_state, "EVERY", 0.01)
    busy, idle = ("1980 MHz, 1, 1, 1, 500 W, 700 W, 60, 0x4", "345 MHz, 1, 1, 1, 100 W, 700 W, 40, 0x1")
    _answers(monkeypatch, busy, busy, idle)
    with gpu_state.watched(torch.device("cuda")) as seen:
        while len(seen.get("clocks.sm", ())) < 2:
            time.sleep(0.01)
    assert seen["clocks.sm"] == ["1980 MHz", "345 MHz"]
    assert seen["power.limit"] == ["700 W"]
    with gpu_state.watched(torch.device("cpu")) as seen:
        pass
    assert seen == {}


def test_tune_replaces_constants_of_the_layout(run, tmp_path):
    arguments = ("--dry-run", "--workloads", "one_huge", "--storages", "fp32", "--only", "block 2048")
    record = run(tune, *arguments, json_to=tmp_path / "tune.json")
    assert set(record["results"][0]["rows"]) == {
        "as it is", "as it is, clipping", "block 2048", "block 2048, clipping",
    }  # fmt: skip
    package = tune.variant({"BLOCK": 2048}).__name__
    assert importlib.import_module(f"{package}.kernels.layout").BLOCK == 2048
    with pytest.raises(ValueError, match="defines no constant BLOK"):
        tune.variant({"BLOK": 2048})


def test_every_candidate_of_tune_changes_constants_that_exist():
    for name, constants in tune.CANDIDATES.items():
        assert "," not in name
        for constant, value in constants.items():
            assert getattr(layout, constant) != value, name
            assert type(getattr(layout, constant)) is type(value), name


def test_tune_leaves_out_a_candidate_that_fails_and_goes_on(run, monkeypatch, tmp_path):
    fails = {"BLOCK": 1000}  # The interpreter refuses a block that is no power of two, as the compiler does.
    monkeypatch.setitem(tune.CANDIDATES, "block 2048", fails)
    arguments = ("--dry-run", "--workloads", "one_huge", "--storages", "fp32", "--only", "block 2048", "tail 512")
    record = run(tune, *arguments, json_to=tmp_path / "tune.json")
    assert set(record["results"][0]["rows"]) == {"as it is", "as it is, clipping", "tail 512", "tail 512, clipping"}
    assert tune.winners([{"storage": "fp32", "workload": "a", "rows": {"as it is": _ratios(1, 1, 1)}}]) == {}


def test_the_gpu_commands_choose_the_device_before_they_import_a_kernel():
    """Triton reads TRITON_INTERPRET when a kernel is imported, and a dry run sets it."""
    code = (
        "import sys, bench.gpu_bench, bench.gpu_tests, bench.tune; print([m for m in sys.modules if '.kernels' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench", "gpu-tune"])
def test_minutes_of_make_reach_the_command(target):
    make = ["make", "--dry-run", target, "OUT=there"]
    limited, default = (
        subprocess.run([*make, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for more in (["MINUTES=3"], [])
    )
    assert limited.split()[-2:] == ["--minutes", "3"]
    assert "--minutes" not in default
    assert "there" in default


def _ratios(low, middle, high):
    return {"vs_first": {"p20": low, "p50": middle, "p80": high}, "ms": {}}


def test_tune_prints_the_lines_to_paste_of_a_candidate_that_is_faster_everywhere():
    rows = [
        {"as it is": _ratios(1, 1, 1), "tail 512": _ratios(1.01, 1.03, 1.04), "block 2048": _ratios(1.1, 1.2, 1.3)},
        {"as it is": _ratios(1, 1, 1), "tail 512": _ratios(1.02, 1.05, 1.06), "block 2048": _ratios(0.99, 1.2, 1.3)},
    ]
    results = [{"storage": "fp32", "workload": w, "rows": r} for w, r in zip(("a", "b"), rows, strict=True)]
    results.append({"storage": "bf16", "workload": "a", "rows": {"as it is": _ratios(1, 1, 1)}})
    assert tune.advice(results).splitlines() == [
        "fp32: tail 512, a 1.030x (1.010 to 1.040), b 1.050x (1.020 to 1.060)",
        "    TAIL = 512",
        "bf16: no candidate is certainly faster on every workload. Change nothing.",
    ]
