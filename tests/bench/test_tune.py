"""tune: candidates, the one that wins, and the one that fails."""

import importlib

import pytest

from bench import tune
from lwadamw.kernels import layout


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
