"""Differences of two arms: drifts and regrets of the same refits, in which shared runs are no noise."""

import math

import pytest

from lwadamw.lab import outcomes
from lwadamw.lab.paired import differences
from lwadamw.lab.transfer import analyse, curves_of
from lwadamw.lab.transfer_table import table
from tests.lab.losses import DATA, LRS, rows_of


def test_a_difference_of_drifts_does_not_carry_the_noise_of_shared_runs(random):
    """The optimum of a drifts by 0, that of b by 0.5. At the proxy they have the same runs."""
    shared = {(lr, seed): 0.02 * random.normal() for lr in LRS for seed in "01"}

    def loss(arm, width, lr, wd, seed):
        own = shared[lr, seed] if width == 64 else 0.02 * random.normal()
        return own + 0.05 * (math.log2(lr / 0.014) - (0.5 * math.log2(width / 64) if arm == "b" else 0)) ** 2

    rows = rows_of(loss, arms=("a", "b"), widths=(64, 128, 256), seeds=("0", "1"))
    (found,) = differences(curves_of(rows))
    a, b = (arm.drift for arm in analyse(rows).arms)
    assert (found.arm, found.other, found.shared) == ("b", "a", (64,))
    assert found.slope == pytest.approx(b.slope - a.slope)
    assert found.slope_high - found.slope_low < math.hypot(a.slope_high - a.slope_low, b.slope_high - b.slope_low)
    assert differences([curve for curve in curves_of(rows) if curve.width == 64]) == []


def test_a_difference_of_regrets_is_that_of_the_same_refits_and_0_where_runs_are_shared(random):
    """The optimum of b drifts by 0.5 octaves per octave, that of a does not. So b's regret at width 256 is 0.05 nats larger."""
    shared = {(lr, seed): 0.004 * random.normal() for lr in LRS for seed in "01"}

    def loss(arm, width, lr, wd, seed):
        if arm == "c" and width == 256:
            return math.inf if lr == 0.01 else 1.0
        own = shared[lr, seed] if width == 64 else 0.004 * random.normal()
        return own + 0.05 * (math.log2(lr / 0.01) - (0.5 * math.log2(width / 64) if arm == "b" else 0)) ** 2

    rows = rows_of(loss, arms=("a", "b", "c"), widths=(64, 128, 256), seeds=("0", "1"))
    found = {(d.arm, d.other): d.regrets for d in analyse(rows).differences}
    a, b, c = (arm.regrets for arm in analyse(rows).arms)
    at_proxy, _, widest = found["b", "a"]
    assert [a[0].lr, b[0].lr] == [0.01, 0.01]
    assert (at_proxy.width, at_proxy.value, at_proxy.low, at_proxy.high) == (64, 0.0, 0.0, 0.0)
    assert widest.value == pytest.approx(b[-1].regret - a[-1].regret)
    assert widest.value == pytest.approx(0.05, abs=0.03)
    assert widest.low < widest.value < widest.high < widest.low + 0.04
    assert math.isinf(c[-1].regret)
    assert math.isnan(found["c", "a"][-1].value)
    given = {(d.arm, d.other): d.regrets for d in analyse(rows, lr=0.02).differences}
    assert given["b", "a"][-1].value == pytest.approx(-0.05, abs=0.03)
    printed = table(analyse(rows), outcomes.Outcomes("runs.csv", "loss", tuple(rows)))
    assert f"{widest.value:+.3f} ({widest.low:+.3f} to {widest.high:+.3f})" in printed


def test_the_paired_differences_of_the_report():
    low = {(d.arm, d.other): d for d in differences(curves_of(outcomes.read(DATA / "transfer_low_wd.csv").rows))}
    high = {(d.arm, d.other): d for d in differences(curves_of(outcomes.read(DATA / "transfer.csv").rows))}
    for found in (high["balanced", "mup"], low["balanced", "kosson2025"]):
        assert found.shared == (64,)
        assert found.slope_high < 0
    assert high["balanced", "mup"].slope == pytest.approx(-0.25, abs=0.01)
    assert low["balanced", "kosson2025"].slope == pytest.approx(-0.31, abs=0.01)
    for found in (low, high):
        for arm in ("mup", "fan2025", "kosson2025", "balanced"):
            assert found[arm, "standard"].regrets[-1].high < -0.19
            shared = found[arm, "standard"].regrets[0]  # the regret itself reaches 0.027 in refits
            assert (shared.width, shared.low, shared.high) == (64, 0.0, 0.0)
            others = [d.regrets[-1] for (one, other), d in found.items() if one == arm and other != "standard"]
            assert all(regret.low <= 0 <= regret.high for regret in others)
