"""gpu_bench: the goals come first, one failure hides no other, time is limited. And what all GPU commands share."""

import json
import subprocess
import sys
import time
import types

import pytest
import torch

from bench import goals, gpu_bench, gpu_state, gpu_tests, harness, peers, step
from lwadamw.state.combinations import COMBINATIONS
from tests.bench.commands import ROOT

CPU = torch.device("cpu")
LONG = 30  # lines that a table may have at most


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
    units = gpu_bench.units(CPU, gpu_bench.ALL, dry=False)
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


def test_gpu_bench_never_falls_back_to_the_torch_backend(monkeypatch):
    backends = []
    monkeypatch.setattr(step, "run", lambda *_, backend=None, **__: backends.append(backend))
    timed = [u for u in gpu_bench.units(CPU, gpu_bench.ALL, dry=False) if u.part in ("step", "storage", "compile")]
    for unit in timed:
        unit.measure()
    assert backends == ["triton"] * len(timed)


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
hangs = gpu_bench.Unit("step", "b", lambda: time.sleep(60))
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
    result = {"workload": "llama_1b", "groups": 1, "tensors": 146, "storage": "fp32", "rows": {"lwadamw": row}}
    us = {name: {"p50": 1.0} for name in ("lwadamw", "torch fused", "torch fused, launched", "lwadamw, launched")}
    record = {
        "step": [result] * 10,
        "storage": [{**result, "storage": name} for name in COMBINATIONS if name != "fp32"],
        "host": {"columns": [{"groups": n, "us": us} for n in (1, 28, 500)]},
        "memory": [{"workload": "llama_1b", "rows": {"lwadamw": {"within": True}}}] * 7,
        "compile": [
            {**result, "rows": {peers.PEERS["compile"][0]: row}},
            {**result, "workload": "one_huge", "rows": {}},
        ],
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


def test_the_gpu_commands_choose_the_device_before_they_import_a_kernel():
    """Triton reads TRITON_INTERPRET when a kernel is imported, and a dry run sets it."""
    code = (
        "import sys, bench.gpu_bench, bench.gpu_tests, bench.tune; print([m for m in sys.modules if '.kernels' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("target", ["gpu-test", "gpu-bench", "gpu-tune"])
def test_minutes_of_make_reach_the_command(target):
    # Within `make test`, make would also print its directory.
    make = ["make", "--dry-run", "--no-print-directory", target, "OUT=there"]
    limited, default = (
        subprocess.run([*make, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for more in (["MINUTES=3"], [])
    )
    assert limited.split()[-2:] == ["--minutes", "3"]
    assert "--minutes" not in default
    assert "there" in default
