"""Profiles: means over the last tenth of a run, in files that keep every digit and are replaced as a whole."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lwadamw
from lwadamw import AdamW, param_groups
from lwadamw.monitor import profile_file
from lwadamw.monitor.reading import Reading


def reading(step, **columns):
    """Make a reading of three segments."""
    n = 3
    base = {"taus": np.full(n, step / 100), "calibrated_at": np.full(n, 1.0)}
    names, roles = ("0.weight", "0.bias", "1.weight"), ("matrix", "vector", "matrix")
    given = {key: np.asarray(value, dtype=np.float64) for key, value in columns.items()}
    return Reading(
        step, names, roles, np.array([2.0, math.nan, 2.0]), np.full(n, 1 / step), np.full(n, 0.1), base | given
    )


def monitored():
    """Make an optimizer with the three segments of `reading`."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4, bias=False))
    groups = param_groups(model, {"all:*": 4}, roles={"0.weight": "matrix", "1.weight": "matrix"})
    return AdamW(groups, lr=torch.tensor(0.25), weight_decay=0.1, betas=(0.9, 0.95))


def test_a_saved_profile_is_the_mean_of_the_last_tenth_of_the_steps_to_the_last_digit(tmp_path):
    readings = [
        reading(50, gain=[9.0, 9.0, 9.0], top=[7.0, 7.0, 7.0]),
        reading(95, gain=[0.1, math.nan, 4.0], weight_rms=[1 / 3, 1.0, 2.0]),
        reading(100, gain=[0.2, math.nan, math.nan], weight_rms=[2 / 3, 1.0, math.inf]),
    ]
    monitor = SimpleNamespace(optimizer=monitored(), readings=readings)
    path = tmp_path / "proxy.json"
    given = profile_file.save(monitor, path, {"batch": 8, "loss": math.nan, "note": "µP"})
    found = profile_file.load(path)
    first, bias, last = found.segments
    assert (found.steps, found.window, found.rule, found.package) == (100, (95, 100), "fan2025", lwadamw.__version__)
    assert found.base == {"lr": 0.25, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert found.meta == {"batch": 8, "loss": None, "note": "µP"}
    assert (first.name, first.role, first.shape, first.fan_in, first.m, first.taus) == (
        "0.weight",
        "matrix",
        (6, 8),
        8,
        2.0,
        0.95,
    )
    assert first.lr == (1 / 95 + 1 / 100) / 2
    assert first.values["gain"] == (0.1 + 0.2) / 2
    assert first.values["weight_rms"] == (1 / 3 + 2 / 3) / 2
    assert (last.values["gain"], last.values["weight_rms"], last.shape) == (4.0, 2.0, (4, 6))
    assert math.isnan(bias.values["gain"])
    assert (bias.fan_in, bias.shape) == (None, (6,))
    assert set(first.values) == {"gain", "weight_rms"}
    assert first.verdict == "too early"
    np.testing.assert_equal([vars(x) for x in found.segments], [vars(x) for x in given.segments])


def test_a_segment_has_its_own_shape(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    groups = param_groups(model, 4, width=8, roles={"0.weight": "matrix"}, segments={"0.weight": (2, 4)})
    one = Reading(1, ("0.weight[0]", "0.weight[1]"), ("matrix",) * 2, *np.ones((3, 2)), {"taus": np.ones(2)})
    given = profile_file.save(SimpleNamespace(optimizer=AdamW(groups), readings=[one]), tmp_path / "p.json")
    assert [x.shape for x in given.segments] == [(2, 8), (4, 8)]
    assert [x.fan_in for x in given.segments] == [8, 8]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "proxy.json"
    path.write_text("old")
    monitor = SimpleNamespace(optimizer=monitored(), readings=[reading(1)])
    with pytest.raises(TypeError, match="meta holds what JSON cannot"):
        profile_file.save(monitor, path, {"model": object()})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            profile_file.save(monitor, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["proxy.json"]
    profile_file.save(monitor, path)
    assert json.loads(path.read_text())["format"] == "lwadamw profile"
    assert os.listdir(tmp_path) == ["proxy.json"]
    with pytest.raises(RuntimeError, match="no reading yet"):
        profile_file.save(SimpleNamespace(optimizer=monitor.optimizer, readings=[]), path)


def test_the_history_is_kept_by_type_and_at_most_50_readings_long(tmp_path):
    readings = [reading(step, gain=[step, math.nan, 4 * step]) for step in range(1, 121)]
    given = profile_file.save(SimpleNamespace(optimizer=monitored(), readings=readings), tmp_path / "p.json")
    found = profile_file.load(tmp_path / "p.json")
    steps = [past.steps for past in found.history]
    assert len(steps) == profile_file.HISTORY
    assert (steps[0], steps[-1]) == (1, 120)
    assert (found.at(50).steps, found.at(120), found.at(500)) == (max(s for s in steps if s <= 50), found, found)
    first = found.history[0]
    assert [x.name for x in first.segments] == ["*.weight", "*.bias"]
    assert first.segments[0].values["gain"] == pytest.approx(2.0)  # the geometric mean of 1 and 4
    assert first.segments[0].taus == 0.01
    np.testing.assert_equal(
        [[vars(x) for x in p.segments] for p in found.history], [[vars(x) for x in p.segments] for p in given.history]
    )
