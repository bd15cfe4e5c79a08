"""Profiles and their comparison: files that keep every digit, predictions of every rule, exit codes, one warning of drift."""

import dataclasses
import json
import math
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lwadamw
from lwadamw import RULES, AdamW, DriftWarning, DriftWatch, Rule, Scale, param_groups
from lwadamw.commands import main
from lwadamw.monitor import profile
from lwadamw.monitor.comparison import DEFAULTS, LAWS, compare
from lwadamw.monitor.profile import Layer, Profile, layer_type
from lwadamw.monitor.reading import Reading

LR, WD, BASE = 3e-3, 0.5, 64
OWN = Rule("own", matrix=Scale(lr=-0.6, wd=0.2))
STATISTICS = ("weight_rms", "relative_update", "rotation", "top", "bulk", "gain", "representation_change")


def made(rule, m, depth=2, taus=5.0, factors=None, noise=0.02):
    """A profile as a rule and the laws have it, layer by layer, times `factors` of (layer, statistic)."""
    generator = np.random.default_rng(0)
    scale = rule.matrix.at(m)
    lr, wd = LR * scale.lr, WD * scale.wd
    layers = []
    for i in range(depth):
        for kind, rows, columns in (("attention.qkv", 3, 1), ("ffn.down", 1, 3)):
            d, k = round(columns * BASE * m), round(rows * BASE * m)
            values = {
                "weight_rms": math.sqrt(lr / wd),
                "relative_update": math.sqrt(lr * wd),
                "rotation": math.sqrt(lr * wd),
                "top": math.sqrt(lr / wd) * d**0.75,
                "bulk": math.sqrt(lr / wd) * (math.sqrt(k) + math.sqrt(d)),
                "gain": 0.3 * math.sqrt(lr / wd) * d**0.75,
                "representation_change": 1.2 * math.sqrt(lr * wd),
                "alignment_ratio": 1.2,
            }
            name = f"layers.{i}.{kind}.weight"
            for key in values:
                values[key] *= (1 + noise * generator.standard_normal()) * (factors or {}).get((kind, key), 1.0)
            layers.append(Layer(name, "matrix", m, lr, wd, taus, (k, d), d, values))
    layers.append(Layer("norm.weight", "vector", math.nan, LR, 0.0, math.nan, (64,), None, {"weight_rms": 1.0}))
    return Profile(tuple(layers), 1000, rule.name, {"lr": LR, "weight_decay": WD}, (910, 1000), {"batch": 8}, "0.1.0")


def written(path, given):
    profile._write(path, given)
    return str(path)


@pytest.mark.parametrize("rule", [*RULES.values(), OWN], ids=lambda rule: rule.name)
def test_what_a_rule_predicts_is_as_predicted(rule):
    m = 4.0
    found = compare(made(rule, 1.0, depth=2), made(rule, m, depth=3), statistics=tuple(LAWS))  # depths may differ
    a, b = rule.matrix.lr, rule.matrix.wd
    expected = {
        "weight_rms": m ** ((a - b) / 2),
        "relative_update": m ** ((a + b) / 2),
        "rotation": m ** ((a + b) / 2),
        "representation_change": m ** ((a + b) / 2),
        "top": m ** ((a - b) / 2 + 0.75),
        "gain": m ** ((a - b) / 2 + 0.75),
        "bulk": m ** ((a - b) / 2 + 0.5),
    }
    rows = [row for row in found.rows if row.role == "matrix"]
    assert {row.statistic for row in rows} == set(STATISTICS) == {*DEFAULTS, "bulk"}
    assert {row.layers for row in rows} == {"layers.*.attention.qkv.weight", "layers.*.ffn.down.weight"}
    for row in rows:
        assert row.predicted == pytest.approx(expected[row.statistic], rel=1e-6), row
        assert row.ratio == pytest.approx(expected[row.statistic], rel=0.1), row
        assert row.verdict == "as predicted"
    assert found.drifted == ()
    assert [row.verdict for row in found.rows if row.role == "vector"] == ["no prediction"]


def test_rules_of_two_runs_may_differ():
    """Predictions come from effective values, not from names of rules."""
    found = compare(made(RULES["mup"], 1.0), made(RULES["kosson2025"], 4.0))
    assert {row.verdict for row in found.rows if row.role == "matrix"} == {"as predicted"}
    wrong = dataclasses.replace(made(RULES["mup"], 4.0), rule="kosson2025")
    assert compare(made(RULES["mup"], 1.0), wrong).drifted == ()


@pytest.mark.parametrize(("factor", "verdict"), [(1.4, "grew"), (1 / 1.4, "shrank"), (1.15, "as predicted")])
def test_what_is_off_is_named_by_type_and_statistic(factor, verdict):
    target = made(RULES["fan2025"], 4.0, factors={("ffn.down", "top"): factor})
    found = compare(made(RULES["fan2025"], 1.0), target)
    (row,) = (r for r in found.rows if r.layers == "layers.*.ffn.down.weight" and r.statistic == "top")
    assert row.verdict == verdict
    assert row.off == pytest.approx(factor, rel=0.1)
    assert found.drifted == ((row,) if verdict != "as predicted" else ())
    assert not compare(made(RULES["fan2025"], 1.0), target, 1.6).drifted


def test_one_layer_of_many_is_found_layer_by_layer():
    def off(layer):
        return dataclasses.replace(layer, values={**layer.values, "weight_rms": 1.5 * layer.values["weight_rms"]})

    target = made(RULES["mup"], 2.0, depth=6)
    target = dataclasses.replace(
        target, layers=tuple(off(x) if x.name == "layers.3.ffn.down.weight" else x for x in target.layers)
    )
    proxy = made(RULES["mup"], 1.0, depth=6)
    assert not compare(proxy, target).drifted
    (row,) = compare(proxy, target, by_layer=True).drifted
    assert (row.layers, row.statistic, row.verdict) == ("layers.3.ffn.down.weight", "weight_rms", "grew")


def test_layers_that_are_not_steady_are_too_early():
    steady, early = made(RULES["mup"], 1.0), made(RULES["mup"], 4.0, taus=2.9, factors={("ffn.down", "top"): 3.0})
    for pair in ((steady, early), (early, steady)):
        found = compare(*pair)
        assert {row.verdict for row in found.rows if row.role == "matrix"} == {"too early"}
        assert found.drifted == ()
    assert compare(steady, early, after=2.5).drifted != ()


def test_a_monitors_expectation_goes_before_the_steady_state():
    """Betas and schedules are in it: here lr has fallen by 4, and the weights have not followed yet."""

    def told(given, fallen):
        layers = []
        for x in given.layers[:-1]:
            rms, update = math.sqrt(x.lr / x.weight_decay), 0.2 * math.sqrt(x.lr * x.weight_decay)
            root = math.sqrt(fallen)
            expected = {"expected_rms": rms, "steady_rms": rms / root, "steady_update": update / root}
            values = {**x.values, **expected, "relative_update": update / fallen}
            layers.append(dataclasses.replace(x, lr=x.lr / fallen, values=values))
        return dataclasses.replace(given, layers=tuple(layers))

    rule = RULES["fan2025"]
    proxy, target = told(made(rule, 1.0), 1), told(made(rule, 4.0), 4)
    rows = compare(proxy, target, statistics=["weight_rms", "relative_update", "top"]).rows
    assert [row.verdict for row in rows] == ["as predicted"] * 6


def test_a_statistic_without_a_law_has_no_prediction():
    (row, _) = compare(made(RULES["mup"], 1.0), made(RULES["mup"], 2.0), statistics=["alignment_ratio"]).rows
    assert row.verdict == "no prediction"
    assert row.ratio == pytest.approx(1, rel=0.1)


def test_layer_types():
    names = {
        "layers.0.w1.weight": "layers.*.w1.weight",
        "h.12.qkv.weight[10]": "h.*.qkv.weight[10]",
        "0.1.weight": "*.*.weight",
        "block2.3": "block2.*",
    }
    assert {name: layer_type(name) for name in names} == names


def test_exit_codes_and_table(tmp_path, capsys):
    rule = RULES["fan2025"]
    proxy = written(tmp_path / "proxy.json", made(rule, 1.0))
    good = written(tmp_path / "good.json", made(rule, 4.0))
    bad = written(tmp_path / "bad.json", made(rule, 4.0, factors={("attention.qkv", "gain"): 1.5}))
    early = written(tmp_path / "early.json", made(rule, 4.0, taus=1.0))

    assert main(["compare", proxy, good]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "proxy   rule fan2025   base lr 0.003, weight_decay 0.5   steps 910 to 1000 of 1000   batch 8"
    )
    assert lines[2].split() == ["role", "layers", "statistic", "proxy", "target", "ratio", "predicted", "off", "by"]
    assert "tolerance 1.25: 12 as predicted, 1 no prediction" in lines[-1]
    assert not any("norm.weight" in line for line in lines)

    assert main(["compare", proxy, bad]) == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("matrix") and "grew" in x)
    assert line.split()[:3] == ["matrix", "layers.*.attention.qkv.weight", "gain"]
    assert main(["compare", proxy, bad, "--tolerance", "2"]) == 0
    assert main(["compare", proxy, bad, "--statistic", "top", "--statistic", "alignment_ratio"]) == 0
    assert main(["compare", proxy, bad, "--full"]) == 1
    assert "layers.1.attention.qkv.weight" in capsys.readouterr().out
    assert main(["compare", proxy, early]) == 0
    assert "nothing could be judged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "No such file"),
        ("{", [], "is no JSON"),
        ("[]", [], "is no profile of lwadamw. Give a file that Monitor.save() wrote"),
        ('{"format": "other"}', [], "is no profile of lwadamw"),
        ('{"format": "lwadamw profile", "version": 0, "lwadamw": "0.0.1"}', [], "has version 0 of the format"),
        ('{"format": "lwadamw profile", "version": 1, "lwadamw": "0.1.0"}', [], "is a damaged profile: KeyError"),
        ("good", ["--tolerance", "1"], "tolerance=1.0 is not above 1"),
        ("good", ["--tolerance", "nan"], "tolerance=nan is not above 1"),
        ("good", ["--tolerance", "x"], "invalid float value"),
        ("good", ["--statistic", "loss"], "no run has the statistic 'loss'"),
        ("other", [], "no layer in common"),
    ],
)
def test_bad_files_and_arguments_exit_with_2_and_say_why(tmp_path, capsys, content, arguments, message):
    proxy = written(tmp_path / "proxy.json", made(RULES["mup"], 1.0))
    target = tmp_path / "target.json"
    if content in ("good", "other"):
        given = made(RULES["mup"], 2.0)
        layers = tuple(dataclasses.replace(x, name="net." + x.name) for x in given.layers)
        written(target, given if content == "good" else dataclasses.replace(given, layers=layers))
    elif content is not None:
        target.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["compare", proxy, str(target), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert content in ("good", "other") or "target.json" in error


def reading(step, **columns):
    n = 3
    base = {"taus": np.full(n, step / 100), "calibrated_at": np.full(n, 1.0)}
    names, roles = ("0.weight", "0.bias", "1.weight"), ("matrix", "vector", "matrix")
    given = {key: np.asarray(value, dtype=np.float64) for key, value in columns.items()}
    return Reading(
        step, names, roles, np.array([2.0, math.nan, 2.0]), np.full(n, 1 / step), np.full(n, 0.1), base | given
    )


def monitored():
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4, bias=False))
    groups = param_groups(model, {"*": 4}, roles={"0.weight": "matrix", "1.weight": "matrix"})
    return AdamW(groups, lr=torch.tensor(0.25), weight_decay=0.1, betas=(0.9, 0.95))


def test_a_saved_profile_is_the_mean_of_the_last_tenth_to_the_last_digit(tmp_path):
    readings = [
        reading(50, gain=[9.0, 9.0, 9.0], top=[7.0, 7.0, 7.0]),
        reading(95, gain=[0.1, math.nan, 4.0], weight_rms=[1 / 3, 1.0, 2.0]),
        reading(100, gain=[0.2, math.nan, math.nan], weight_rms=[2 / 3, 1.0, math.inf]),
    ]
    monitor = SimpleNamespace(optimizer=monitored(), readings=readings)
    path = tmp_path / "proxy.json"
    given = profile.save(monitor, path, {"batch": 8, "loss": math.nan, "note": "µP"})
    found = profile.load(path)
    first, bias, last = found.layers
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
    np.testing.assert_equal([vars(x) for x in found.layers], [vars(x) for x in given.layers])


def test_a_parts_shape_is_its_own(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    groups = param_groups(model, 4, width=8, roles={"0.weight": "matrix"}, segments={"0.weight": (2, 4)})
    one = Reading(1, ("0.weight[0]", "0.weight[1]"), ("matrix",) * 2, *np.ones((3, 2)), {"taus": np.ones(2)})
    given = profile.save(SimpleNamespace(optimizer=AdamW(groups), readings=[one]), tmp_path / "p.json")
    assert [x.shape for x in given.layers] == [(2, 8), (4, 8)]
    assert [x.fan_in for x in given.layers] == [8, 8]


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "proxy.json"
    path.write_text("old")
    monitor = SimpleNamespace(optimizer=monitored(), readings=[reading(1)])
    with pytest.raises(TypeError, match="meta holds what JSON cannot"):
        profile.save(monitor, path, {"model": object()})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            profile.save(monitor, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["proxy.json"]
    profile.save(monitor, path)
    assert json.loads(path.read_text())["format"] == "lwadamw profile"
    assert os.listdir(tmp_path) == ["proxy.json"]
    with pytest.raises(RuntimeError, match="no reading yet"):
        profile.save(SimpleNamespace(optimizer=monitor.optimizer, readings=[]), path)


def live(given, step, taus, factor=1.0):
    """A profile's values as a reading, one statistic of one type of layers off by a factor."""
    layers = given.layers[:-1]
    columns = {key: np.array([x.values[key] for x in layers]) for key in layers[0].values}
    columns["weight_rms"][[x.name.endswith("ffn.down.weight") for x in layers]] *= factor
    columns["taus"] = np.full(len(layers), taus)
    return Reading(
        step,
        tuple(x.name for x in layers),
        tuple(x.role for x in layers),
        *(np.array([getattr(x, key) for x in layers]) for key in ("m", "lr", "weight_decay")),
        columns,
    )


def test_drift_warns_once_as_soon_as_it_can_be_told(tmp_path):
    rule = RULES["fan2025"]
    watch = DriftWatch(written(tmp_path / "proxy.json", made(rule, 1.0)))
    target = made(rule, 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(live(target, 10, 2.9, factor=3.0))  # too early, however far off
        watch(live(target, 20, 3.0, factor=1.8))  # the first reading that counts: may be chance
        watch(live(target, 30, 3.1))
        watch(live(target, 40, 3.2, factor=1.8))
    with pytest.warns(DriftWarning) as caught:
        watch(live(target, 50, 3.3, factor=1.8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(live(target, 60, 3.4, factor=1.8))
    (message,) = (str(w.message) for w in caught)
    assert "step 50: not what the profile predicts, by more than 1.5:" in message
    assert "layers.*.ffn.down.weight: weight_rms grew to " in message
    assert ", 1.8" in message.partition("weight_rms grew to")[2]
    assert "qkv" not in message
    assert watch.warned


def test_no_drift_no_warning():
    rule = RULES["kosson2025"]
    watch = DriftWatch(made(rule, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 11):
            watch(live(made(rule, 4.0), step, step, factor=1.3))
    assert not watch.warned


def test_drift_is_told_from_the_same_step_of_the_proxy():
    """Both runs start with weights 3 times too large and end as predicted; a third one stays large."""
    rule = RULES["fan2025"]
    proxy, target = made(rule, 1.0), made(rule, 4.0)
    early = dataclasses.replace(made(rule, 1.0, factors={("ffn.down", "weight_rms"): 3.0}).by_type(), steps=100)
    watch = DriftWatch(dataclasses.replace(proxy, history=(early, dataclasses.replace(proxy.by_type(), steps=500))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, factor in ((100, 3.0), (200, 3.0), (300, 3.0), (500, 1.0), (2000, 1.0)):
            watch(live(target, step, 9.0, factor))
        watch(live(target, 3000, 9.0, factor=3.0))
    with pytest.warns(DriftWarning, match="ffn.down.weight: weight_rms grew"):
        watch(live(target, 4000, 9.0, factor=3.0))


def test_the_way_there_is_kept_by_type_and_thinned(tmp_path):
    readings = [reading(step, gain=[step, math.nan, 4 * step]) for step in range(1, 121)]
    given = profile.save(SimpleNamespace(optimizer=monitored(), readings=readings), tmp_path / "p.json")
    found = profile.load(tmp_path / "p.json")
    steps = [past.steps for past in found.history]
    assert len(steps) == profile.HISTORY
    assert (steps[0], steps[-1]) == (1, 120)
    assert (found.at(50).steps, found.at(120), found.at(500)) == (max(s for s in steps if s <= 50), found, found)
    first = found.history[0]
    assert [x.name for x in first.layers] == ["*.weight", "*.bias"]
    assert first.layers[0].values["gain"] == pytest.approx(2.0)  # geometric mean of 1 and 4
    assert first.layers[0].taus == 0.01
    np.testing.assert_equal(
        [[vars(x) for x in p.layers] for p in found.history], [[vars(x) for x in p.layers] for p in given.history]
    )


def test_a_profile_of_another_model_is_told_and_does_not_end_the_run():
    watch = DriftWatch(Profile((Layer("w", "matrix", 1.0, LR, WD, 9.0),), 10))
    with pytest.warns(DriftWarning, match="nothing is watched: .* no layer in common. The proxy has w"):
        watch(live(made(RULES["mup"], 1.0), 1, 1.0))
    with pytest.raises(ValueError, match="tolerance=0.8 is not above 1"):
        DriftWatch(watch.reference, tolerance=0.8)


def test_a_monitored_run_is_compared_with_its_wider_self(tmp_path, device):
    """From param_groups to the exit code, gradients of noise, past 3 tau: nothing is off."""
    paths = []
    for width in (16, 32):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(2))).to(device)
        groups = param_groups(model, 16, "kosson2025", roles={"*.weight": "matrix"}, width=width)
        optimizer = AdamW(groups, lr=4e-2, weight_decay=2.0, betas=(0.9, 0.95))
        monitor = lwadamw.Monitor(optimizer, model, every=5, spectrum_every=0)
        watch = None
        if paths:
            watch = DriftWatch(paths[0])
            monitor.on_reading.append(watch)
        for _ in range(50):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        paths.append(str(tmp_path / f"{width}.json"))
        monitor.save(paths[-1], width=width)
    found = compare(*map(profile.load, paths))
    assert {row.verdict for row in found.rows} == {"as predicted"}
    assert {row.statistic for row in found.rows} == {"weight_rms", "relative_update", "rotation"}
    assert main(["compare", *paths]) == 0
    assert not watch.warned
