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
        watch(live(target, 20, 3.0, factor=1.8))  # the first reading that counts; one reading can be chance
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
        DriftWatch(watch.reference, tolerance=0.8)
