"""What people and loggers get of a reading: the report, flat numbers, medians by role, and a profile file."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from lwadamw import AdamW, Monitor, param_groups
from lwadamw.monitor.reading import Reading
from lwadamw.monitor.report import as_dict
from lwadamw.step.norms import Norms
from tests.cases import train_on_noise


def _model_with_roles():
    """Make an optimizer with matrices and vectors, and its monitor."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
            self.norm = nn.LayerNorm(8)

    model = Model()
    optimizer = AdamW(param_groups(model, 4, rule="fan2025"), lr=1e-2, weight_decay=1.0)
    return optimizer, Monitor(optimizer, every=5, steps=1000)


def test_as_dict_and_by_role_hold_the_latest_reading():
    optimizer, monitor = _model_with_roles()
    assert (monitor.latest, monitor.as_dict(), monitor.by_role()) == (None, {}, {})
    train_on_noise(optimizer, 5)
    columns, names = monitor.latest.columns, monitor.latest.names
    flat = monitor.as_dict("lw/")
    assert flat["lw/rms_ratio/layers.1.weight"] == columns["rms_ratio"][names.index("layers.1.weight")]
    matrices = [i for i, role in enumerate(monitor.latest.roles) if role == "matrix"]
    assert len(matrices) == 3
    median = np.median(columns["top"][matrices])
    assert flat["lw/role/matrix/top"] == monitor.by_role()["matrix"]["top"] == median
    assert set(monitor.by_role()) == {"matrix", "vector"}
    assert "rms_ratio" not in monitor.by_role()["vector"]
    assert "lw/rms_ratio/embed.weight" not in flat
    assert all(type(value) is float and math.isfinite(value) for value in flat.values())


def test_as_dict_of_roles_has_totals_that_are_roots_of_sums_of_squares_and_no_segment():
    optimizer, monitor = _model_with_roles()
    train_on_noise(optimizer, 5)
    whole, roles = monitor.as_dict("lw/"), monitor.as_dict("lw/", roles_only=True)
    assert roles == {name: value for name, value in whole.items() if name.startswith("lw/role/")}
    for role in ("matrix", "vector"):
        params = [p for group in optimizer.param_groups if group["role"] == role for p in group["params"]]
        for kind, tensors in {"weight_norm": params, "grad_norm": [p.grad for p in params]}.items():
            expected = torch.cat([x.detach().double().flatten() for x in tensors]).norm().item()
            assert roles[f"lw/role/{role}/{kind}"] == pytest.approx(expected, rel=1e-6)
        assert roles[f"lw/role/{role}/update_norm"] > 0


def test_a_total_of_which_a_part_is_not_known_is_left_out():
    norms = Norms(("a", "b"), np.array([3.0, 4.0]), np.array([3.0, np.nan]), np.full(2, np.nan), np.zeros(2))
    reading = Reading(1, norms.names, ("matrix",) * 2, *np.ones((3, 2)), norms=norms)
    assert as_dict(reading, "") == {"role/matrix/weight_norm": 5.0}


def test_the_report_has_a_line_per_role_and_type_of_layer():
    optimizer, monitor = _model_with_roles()
    assert monitor.report() == "no reading yet: the first is after step 1"
    train_on_noise(optimizer, 10)
    lines = monitor.report(200).split("\n\n")[0].splitlines()
    assert lines[0].startswith("step 10 of 1000   median")
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:]] == [
        "role vector x3",
        "role matrix x3",
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "layers.*.weight x3",
    ]
    ratios = monitor.latest.columns["rms_ratio"]
    shown = f"{np.nanmedian(ratios):.3g} ({np.nanmin(ratios):.3g} to {np.nanmax(ratios):.3g})"
    assert shown in lines[3]
    assert lines[3].endswith("  " + monitor.verdicts["layers.0.weight"])
    assert lines[2].endswith("  no decay")


def test_save_writes_a_profile(tmp_path):
    optimizer, monitor = _model_with_roles()
    train_on_noise(optimizer, 5)
    monitor.save(tmp_path / "proxy.json", batch=7)
    assert (tmp_path / "proxy.json").read_text().count("layers.1.weight") == 1


class _FeedForward(nn.Module):
    """The feed-forward layer of LLaMA, with the names of its reference code."""

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.w2 = nn.Linear(12, 8, bias=False)


def test_the_report_has_its_own_line_for_each_of_w1_w2_and_w3():
    """Layer numbers are replaced by `*`. Digits inside a name are not."""
    model = nn.Module()
    model.layers = nn.ModuleList(_FeedForward() for _ in range(2))
    optimizer = AdamW(param_groups(model, {"all:*": 4}, roles={"*.weight": "matrix"}), lr=1e-2, weight_decay=1.0)
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 1)
    titles = [re.split(r"\s{2,}", line)[0] for line in monitor.report(120).splitlines()[2:]]
    assert titles[0] == "role matrix x6"
    assert sorted(titles[1:]) == [f"layers.*.{name}.weight x2" for name in ("w1", "w2", "w3")]


def _long_names():
    """Make a monitor of a model with long names, some of which have no decay, under a schedule with long verdicts."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(11, 8)
    model.model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in model.model.layers:
        layer.self_attention = nn.Module()
        layer.self_attention.qkv_projection = nn.Linear(8, 24, bias=False)
    model.language_model_head = nn.Linear(8, 11, bias=False)
    roles = {"*head.weight": "output", "*projection.weight": "matrix"}
    groups = param_groups(model, 4, width=8, roles=roles, segments={"*projection.weight": 3})
    optimizer = AdamW(groups, lr=0.1, weight_decay=5.0)
    monitor = Monitor(optimizer, every=1, steps=123456)
    train_on_noise(optimizer, 12)
    for _ in range(30):
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
        train_on_noise(optimizer, 1)
    assert re.search(r"steady from step \d+ to step \d+", monitor.report(250))
    return monitor


def test_the_report_fits_every_width_and_leaves_columns_out_in_the_order_that_it_says():
    monitor = _long_names()
    parts = ("rotation/steady", "smallest to largest", "rms/expected", "role  ", "update/steady", "taus")
    stages = set()
    for width in range(76, 251, 3):
        text = monitor.report(width)
        assert max(map(len, text.splitlines())) <= width, width
        gone = [part not in text.replace("role vector", "") for part in parts]
        assert gone == sorted(gone, reverse=True), (width, gone)
        stages.add(sum(gone))
        assert "rms/steady" in text
        assert "language_model_head.weight" in text or width < 100
    assert stages == {0, 1, 2, 3, 4, 5, 6}
    assert re.search(r"^m\S*\.\.\.\S*weight\[0\] x2 ", monitor.report(80), re.MULTILINE)


def test_the_report_is_as_wide_as_the_terminal(monkeypatch):
    """Without COLUMNS and without a terminal it is 120 wide."""
    monitor = _long_names()
    monkeypatch.setattr("sys.__stdout__", None)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert monitor.report() == monitor.report(120) != monitor.report(80)
    monkeypatch.setenv("COLUMNS", "80")
    assert monitor.report() == monitor.report(80)
