"""The comparison of two runs predicts what every rule does, and names what differs from the prediction."""

import dataclasses
import math

import pytest

from lwadamw import RULES, Rule, Scale
from lwadamw.monitor.comparison import compare
from lwadamw.monitor.laws import DEFAULTS, LAWS, predicted_ratio
from lwadamw.monitor.profile import SegmentProfile
from lwadamw.state.names import layer_type
from tests.monitor.profiles import made

OWN = Rule("own", matrix=Scale(lr=-0.6, wd=0.2))


STATISTICS = ("weight_rms", "relative_update", "rotation", "top", "bulk", "gain", "representation_change")


@pytest.mark.parametrize("rule", [*RULES.values(), OWN], ids=lambda rule: rule.name)
def test_runs_that_follow_a_rule_are_as_predicted(rule):
    """The two runs have different depths, and the comparison still matches their types of layers."""
    m = 4.0
    found = compare(made(rule, 1.0, depth=2), made(rule, m, depth=3), statistics=tuple(LAWS))
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
    rows = [row for row in found.findings if row.role == "matrix"]
    assert {row.statistic for row in rows} == set(STATISTICS) == {*DEFAULTS, "bulk"}
    assert {row.layers for row in rows} == {"layers.*.attention.qkv.weight", "layers.*.ffn.down.weight"}
    for row in rows:
        assert row.predicted == pytest.approx(expected[row.statistic], rel=1e-6), row
        assert row.ratio == pytest.approx(expected[row.statistic], rel=0.1), row
        assert row.verdict == "as predicted"
    assert found.drifted == ()
    assert [row.verdict for row in found.findings if row.role == "vector"] == ["no prediction"]


def test_the_rules_of_two_runs_can_differ():
    """Predictions come from effective values. The names of the rules do not matter."""
    found = compare(made(RULES["mup"], 1.0), made(RULES["kosson2025"], 4.0))
    assert {row.verdict for row in found.findings if row.role == "matrix"} == {"as predicted"}
    wrong = dataclasses.replace(made(RULES["mup"], 4.0), rule="kosson2025")
    assert compare(made(RULES["mup"], 1.0), wrong).drifted == ()


@pytest.mark.parametrize(("factor", "verdict"), [(2.5, "grew"), (1 / 2.5, "shrank"), (2.0, "as predicted")])
def test_a_difference_is_named_by_type_and_statistic(factor, verdict):
    target = made(RULES["fan2025"], 4.0, factors={("ffn.down", "top"): factor})
    found = compare(made(RULES["fan2025"], 1.0), target)
    (row,) = (r for r in found.findings if r.layers == "layers.*.ffn.down.weight" and r.statistic == "top")
    assert row.verdict == verdict
    assert row.off == pytest.approx(factor, rel=0.1)
    assert found.drifted == ((row,) if verdict != "as predicted" else ())
    assert not compare(made(RULES["fan2025"], 1.0), target, 1.6).drifted


def test_one_layer_of_many_is_found_with_by_layer():
    def off(segment):
        return dataclasses.replace(segment, values={**segment.values, "weight_rms": 2.5 * segment.values["weight_rms"]})

    target = made(RULES["mup"], 2.0, depth=6)
    target = dataclasses.replace(
        target, segments=tuple(off(x) if x.name == "layers.3.ffn.down.weight" else x for x in target.segments)
    )
    proxy = made(RULES["mup"], 1.0, depth=6)
    assert not compare(proxy, target).drifted
    (row,) = compare(proxy, target, by_layer=True).drifted
    assert (row.layers, row.statistic, row.verdict) == ("layers.3.ffn.down.weight", "weight_rms", "grew")


def test_layers_before_three_tau_are_too_early():
    steady, early = made(RULES["mup"], 1.0), made(RULES["mup"], 4.0, taus=2.9, factors={("ffn.down", "top"): 3.0})
    for pair in ((steady, early), (early, steady)):
        found = compare(*pair)
        assert {row.verdict for row in found.findings if row.role == "matrix"} == {"too early"}
        assert found.drifted == ()
    assert compare(steady, early, after=2.5).drifted != ()


def test_what_the_monitor_expected_is_used_before_the_steady_state():
    """The monitor follows the schedule. Here lr has fallen by a factor of 4, and the weights have not followed yet."""

    def told(given, fallen):
        segments = []
        for x in given.segments[:-1]:
            rms, update = math.sqrt(x.lr / x.weight_decay), 0.2 * math.sqrt(x.lr * x.weight_decay)
            root = math.sqrt(fallen)
            expected = {"expected_rms": rms, "steady_rms": rms / root, "steady_update": update / root}
            values = {**x.values, **expected, "relative_update": update / fallen}
            segments.append(dataclasses.replace(x, lr=x.lr / fallen, values=values))
        return dataclasses.replace(given, segments=tuple(segments))

    rule = RULES["fan2025"]
    proxy, target = told(made(rule, 1.0), 1), told(made(rule, 4.0), 4)
    rows = compare(proxy, target, statistics=["weight_rms", "relative_update", "top"]).findings
    assert [row.verdict for row in rows] == ["as predicted"] * 6


def test_a_statistic_without_a_law_has_no_prediction():
    (row, _) = compare(made(RULES["mup"], 1.0), made(RULES["mup"], 2.0), statistics=["alignment_ratio"]).findings
    assert row.verdict == "no prediction"
    assert row.ratio == pytest.approx(1, rel=0.1)


def test_layer_types_keep_digits_inside_a_name():
    names = {
        "layers.0.w1.weight": "layers.*.w1.weight",
        "h.12.qkv.weight[10]": "h.*.qkv.weight[10]",
        "0.1.weight": "*.*.weight",
        "block2.3": "block2.*",
    }
    assert {name: layer_type(name) for name in names} == names


@pytest.mark.parametrize("experts", [1, 6])
def test_the_bulk_of_packed_experts_follows_the_shape_of_one_expert(experts):
    """A convolution of three dimensions is one matrix (out, patch), and experts are matrices (out, in)."""

    def one(shape, fan_in):
        return [SegmentProfile("w", "matrix", 1.0, 1e-3, 0.1, 5.0, shape, fan_in, {})]

    packed = predicted_ratio("bulk", one((experts, 64, 16), 16), one((experts, 1024, 64), 64))
    assert packed == pytest.approx((1024**0.5 + 64**0.5) / (64**0.5 + 16**0.5))
    convolution = predicted_ratio("bulk", one((64, 16, 3), 48), one((256, 64, 3), 192))
    assert convolution == pytest.approx(2.0)
