"""The drift watch warns once, only when it can be sure, and never ends the run that it watches."""

import dataclasses
import warnings

import numpy as np
import pytest

from lwadamw import RULES, DriftWarning, DriftWatch
from lwadamw.monitor.profile import Profile, SegmentProfile
from lwadamw.monitor.reading import Reading
from tests.monitor.profiles import LR, WD, made, written


def live(given, step, taus, factor=1.0):
    """Make a reading with the values of a profile. The weight RMS of ffn.down is multiplied by a factor."""
    segments = given.segments[:-1]
    columns = {key: np.array([x.values[key] for x in segments]) for key in segments[0].values}
    columns["weight_rms"][[x.name.endswith("ffn.down.weight") for x in segments]] *= factor
    columns["taus"] = np.full(len(segments), taus)
    return Reading(
        step,
        tuple(x.name for x in segments),
        tuple(x.role for x in segments),
        *(np.array([getattr(x, key) for x in segments]) for key in ("m", "lr", "weight_decay")),
        columns,
    )


def test_drift_warns_once_and_as_early_as_it_is_certain(tmp_path):
    rule = RULES["fan2025"]
    watch = DriftWatch(written(tmp_path / "proxy.json", made(rule, 1.0)))
    target = made(rule, 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(live(target, 10, 2.9, factor=3.0))  # too early, although the factor is large
        watch(live(target, 20, 3.0, factor=2.8))  # the first reading that counts; one reading can be chance
        watch(live(target, 30, 3.1))
        watch(live(target, 40, 3.2, factor=2.8))
    with pytest.warns(DriftWarning) as caught:
        watch(live(target, 50, 3.3, factor=2.8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(live(target, 60, 3.4, factor=2.8))
    (message,) = (str(w.message) for w in caught)
    assert "step 50: not what the profile predicts:" in message
    assert "layers.*.ffn.down.weight: weight_rms grew to " in message
    assert ", 2.8" in message.partition("weight_rms grew to")[2]
    assert "qkv" not in message
    assert watch.warned


def test_there_is_no_warning_without_drift():
    rule = RULES["kosson2025"]
    watch = DriftWatch(made(rule, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 11):
            watch(live(made(rule, 4.0), step, step, factor=1.3))
    assert not watch.warned


def test_a_reading_is_compared_with_the_same_step_of_the_proxy():
    """Both runs start with weights that are 3 times too large and end as predicted. Only staying large is drift."""
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


def test_a_profile_of_another_model_is_reported_and_does_not_end_the_run():
    watch = DriftWatch(Profile((SegmentProfile("w", "matrix", 1.0, LR, WD, 9.0),), 10))
    with pytest.warns(DriftWarning, match="nothing is watched: .* no layer in common. The proxy has w"):
        watch(live(made(RULES["mup"], 1.0), 1, 1.0))
    with pytest.raises(ValueError, match="tolerance=0.8 is not above 1"):
        DriftWatch(watch.references, tolerance=0.8)


def standing(reading, given, rule):
    """Return the reading with the fan_in and the rule that a monitor adds."""
    return dataclasses.replace(reading, fan_in=np.array([x.fan_in for x in given.segments[:-1]], float), rule=rule)


def told(watch, *readings):
    """Return the messages of the warnings that a watch gives at some readings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reading in readings:
            watch(reading)
    return [str(w.message) for w in caught]


def test_weights_that_are_not_finite_are_warned_of_at_once():
    rule = RULES["fan2025"]
    reading = live(made(rule, 4.0), 1, 0.0)
    reading.columns["weight_rms"][1] = np.nan
    (message,) = told(DriftWatch(made(rule, 1.0)), reading)
    assert "step 1: weights are NaN or infinite: layers.0.ffn.down.weight" in message


def test_top_and_gain_are_watched_under_standard_which_has_no_width_ratio():
    standard = RULES["standard"]
    proxy, target = made(standard, 1.0), made(standard, 4.0, factors={("ffn.down", "top"): 2.8})

    def unscaled(given):
        return dataclasses.replace(given, segments=tuple(dataclasses.replace(x, m=np.nan) for x in given.segments))

    readings = [standing(live(unscaled(target), step, 4.0), target, "standard") for step in (100, 110)]
    old = dataclasses.replace(unscaled(proxy).by_type(), steps=50)
    without_fan_in = tuple(dataclasses.replace(x, fan_in=None) for x in old.segments)
    for history in ((), (old,), (dataclasses.replace(old, segments=without_fan_in),)):
        (message,) = told(DriftWatch(dataclasses.replace(unscaled(proxy), history=history)), *readings)
        assert "layers.*.ffn.down.weight: top grew" in message


@pytest.mark.parametrize(("name", "m"), [("standard", 4.0), ("fan2025", 2.0)])
def test_a_run_that_does_not_follow_the_rule_of_its_proxy_is_warned_of_at_its_first_reading(name, m):
    target = made(RULES[name], m, width=4.0)
    watch = DriftWatch(made(RULES["fan2025"], 1.0))
    (message,) = told(watch, standing(live(target, 1, 0.0), target, name))
    assert "step 1: not held: fan2025 claims that top and gain stay equal: " in message
    assert ("under standard" if name == "standard" else "Check base_width") in message


def test_two_proxies_widen_the_tolerance():
    rule = RULES["fan2025"]
    some = [made(rule, 1.0, noise=0.25, seed=seed) for seed in (1, 2)]
    target = made(rule, 4.0)
    readings = [standing(live(target, step, 4.0, factor=2.8), target, "fan2025") for step in (100, 110)]
    assert told(DriftWatch(made(rule, 1.0)), *readings)
    assert not told(DriftWatch(some), *readings)
    with pytest.raises(ValueError, match="there is no reference"):
        DriftWatch([])
