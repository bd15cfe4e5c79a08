"""Optimum, drift, regret and ridge: on published curves, and on losses with known results."""

import csv
import json
import math

import numpy as np
import pytest

from lwadamw.commands import main
from lwadamw.lab import outcomes
from lwadamw.lab.curves import Curve, lowest, noise_of
from lwadamw.lab.exponents import STUDENT, exponent, student
from lwadamw.lab.outcomes import Outcome
from lwadamw.lab.ridge import ridge
from lwadamw.lab.transfer import analyse, curves_of
from lwadamw.lab.transfer_table import table
from tests.lab.losses import DATA, LRS, rows_of

KOSSON = DATA / "kosson2025_fig1.csv"


@pytest.fixture(scope="module")
def published():
    return outcomes.read(KOSSON)


def test_published_optimum_is_flat_with_independent_decay_and_drifts_with_standard(published):
    found = {arm.name: arm for arm in analyse(published.rows).arms}
    assert [o.width for o in found["independent"].optima] == [128, 256, 512, 1024, 2048]
    for o in found["independent"].optima:
        assert 0.004 <= o.lr <= 0.016
        assert 0.004 <= o.best_lr <= 0.016
    assert 2 <= found["standard"].drift.total <= 3
    assert found["standard"].drift.slope_low > 0 > found["independent"].drift.slope_low


def test_published_regret_of_the_proxys_learning_rate(published):
    found = analyse(published.rows, lr=0.008)
    regrets = {arm.name: arm.regrets[-1] for arm in found.arms}
    assert {name: r.width for name, r in regrets.items()} == dict.fromkeys(("independent", "standard", "none"), 2048)
    for name, expected in (("independent", 0.0), ("standard", 0.056), ("none", 0.051)):
        assert regrets[name].regret == pytest.approx(expected, abs=0.003)
        assert regrets[name].reached == "run"


def test_published_singular_values_follow_the_square_root_law():
    with (DATA / "fan2025_fig1.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    base = float(rows["base"]["sigma_1"])
    for name in ("lambda2", "lambda0.5"):
        expected = (float(rows[name]["eta_factor"]) / float(rows[name]["lambda_factor"])) ** 0.5
        assert float(rows[name]["sigma_1"]) / base == pytest.approx(expected, rel=0.05)


def test_the_optimum_is_the_vertex_of_the_parabola_on_any_grid(random):
    for _ in range(20):
        x = np.cumsum(random.uniform(0.5, 1.5, 6))
        y = random.uniform(1, 3, 6)
        i = random.integers(1, 5)
        y[i] = 0.5
        a, b, _ = np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2)
        assert lowest(x, y)[0] == pytest.approx(-b / (2 * a))


INF = math.inf


@pytest.mark.parametrize(
    ("losses", "octave", "edge"),
    [
        ([1, 2, 3, 4], 0, "lowest lr"),
        ([4, 3, 2, 1], 3, "highest lr"),
        ([3, 2, 1, INF], 2, "next to a diverged run"),
        ([INF, 1, 2, 3], 1, "next to a diverged run"),
        ([3, 1, 1, 3], 1.5, ""),
        ([3, 1, 1, 1, 3], 2, ""),
        ([2, 1, 1], 1.5, ""),
        ([3, 2, 2, INF], 1.5, ""),
        ([INF, INF], math.nan, "no run ended"),
    ],
    ids=str,
)
def test_no_optimum_is_extrapolated_and_equally_low_points_are_averaged(losses, octave, edge):
    curve = Curve.of([Outcome("a", 64, 2.0**i, None, None, float(loss)) for i, loss in enumerate(losses)])
    assert lowest(curve.log2_lr, curve.mean)[0] == pytest.approx(octave, nan_ok=True)
    assert curve.edge == edge


def test_the_interval_of_an_optimum_at_the_edge_is_open_on_that_side():
    rising = analyse(rows_of(lambda arm, width, lr, wd, seed: lr, widths=(64,))).arms[0].optima[0]
    falling = analyse(rows_of(lambda arm, width, lr, wd, seed: -lr, widths=(64,))).arms[0].optima[0]
    walled = rows_of(lambda arm, width, lr, wd, seed: -lr if lr < 0.03 else INF, widths=(64,))
    beside = analyse(walled, noise=1e-6).arms[0].optima[0]
    assert (rising.low, falling.high) == (0, INF)
    assert (beside.low, beside.lr, beside.high) == (pytest.approx(0.01), pytest.approx(0.02), pytest.approx(0.04))


def test_the_drift_is_open_where_an_optimum_is_at_the_edge():
    """At every width the lowest lr is best. So the drift may be anything, and an interval of width 0 would be wrong."""
    flat = analyse(rows_of(lambda arm, width, lr, wd, seed: lr)).arms[0].drift
    assert (flat.slope_low, flat.slope_high, flat.total_low, flat.total_high) == (-INF, INF, -INF, INF)

    def loss(arm, width, lr, wd, seed):
        return lr if width == 256 else 0.1 * math.log2(lr / 0.01) ** 2

    one = analyse(rows_of(loss), noise=1e-4)
    drift = one.arms[0].drift
    assert drift.slope_low == -INF
    assert drift.slope < drift.slope_high < drift.slope + 0.1
    assert drift.at_edge == (256,)
    text = table(one, outcomes.Outcomes("x.csv", "loss", tuple(rows_of(loss))))
    assert f"{drift.slope:+.2f} (at most {drift.slope_high:+.2f})" in text
    assert one.as_dict()["arms"][0]["drift"]["slope_low"] is None


def test_noise_that_may_move_an_optimum_to_the_edge_opens_its_interval():
    losses = [1.0, 1.01, 2.0, 3.0, 4.0, 5.0]
    rows = rows_of(lambda arm, width, lr, wd, seed: losses[LRS.index(lr)] - 0.02 * (lr == LRS[1]), widths=(64,))
    optimum = analyse(rows, noise=0.03).arms[0].optima[0]
    assert optimum.edge == ""
    assert optimum.low == 0
    assert LRS[0] < optimum.high < LRS[2]


def test_drift_is_the_slope_of_the_optima(random):
    slope = random.uniform(-0.5, 0.5)

    def loss(arm, width, lr, wd, seed):
        return 2 + 0.1 * (math.log2(lr / 0.015) - slope * math.log2(width / 128)) ** 2

    drift = analyse(rows_of(loss), noise=1e-3).arms[0].drift
    assert drift.slope == pytest.approx(slope)
    assert drift.total == pytest.approx(2 * slope)
    assert drift.slope_low < slope < drift.slope_high
    assert drift.at_edge == ()


def test_noise_is_estimated_from_seeds_and_a_shift_of_a_whole_curve_does_not_count(random):
    offsets = {str(seed): random.normal() for seed in range(4)}

    def loss(arm, width, lr, wd, seed):
        return 2 + 0.05 * math.log2(lr / 0.01) ** 2 + offsets[seed] + 0.004 * random.normal()

    rows = rows_of(loss, widths=tuple(2**i for i in range(6, 26)), seeds=tuple(offsets))
    assert noise_of(curves_of(rows)) == pytest.approx(0.004, rel=0.25)
    arm = analyse(rows).arms[0]
    assert arm.noise_from == "seeds"
    # Each of the 20 intervals holds the truth with a probability of 95 %. 14 or fewer hold it one time in 3000.
    assert sum(o.low <= 0.01 <= o.high for o in arm.optima) > 14
    assert all(math.log2(o.high / o.low) < 1 for o in arm.optima)


def test_a_further_seed_at_one_learning_rate_takes_no_estimate_away():
    rows = [Outcome("a", 64, lr, None, str(seed), loss) for seed, losses in enumerate(([3, 2, 3.5], [3.1, 2.3, 3.3]))
            for lr, loss in zip((1.0, 2.0, 4.0), losses, strict=True)]  # fmt: skip
    further = Outcome("a", 64, 2.0, None, "2", 2.9)
    table = np.array([[row.loss for row in rows[:3]], [row.loss for row in rows[3:]]])
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    for some in (rows, [*rows, further]):  # one run of a seed says nothing: it is as far off as its seed
        assert noise_of(curves_of(some)) == pytest.approx(math.sqrt((rest**2).sum() / 2))


def test_without_seeds_the_noise_is_the_given_value():
    rows = rows_of(lambda arm, width, lr, wd, seed: 0.05 * math.log2(lr / 0.01) ** 2)
    narrow, wide = (analyse(rows, noise=noise).arms[0] for noise in (0.001, 0.03))
    assert (narrow.noise, narrow.noise_from) == (0.001, "given")
    assert wide.optima[0].high / wide.optima[0].low > narrow.optima[0].high / narrow.optima[0].low > 1


def test_a_seed_that_diverged_counts_as_infinite():
    def loss(arm, width, lr, wd, seed):
        return INF if (lr, seed) == (LRS[2], "1") else 2 + abs(math.log2(lr / LRS[2]))

    optimum = analyse(rows_of(loss, widths=(64,), seeds=("0", "1"))).arms[0].optima[0]
    assert optimum.best_lr != LRS[2]
    assert (optimum.runs, optimum.diverged) == (12, 1)


@pytest.mark.parametrize("seeds", [(None, None, None), (None, None, "0"), ("0", None, "1")])
def test_every_run_counts_once_with_and_without_seeds(seeds):
    losses = (1.0, 2.0, 6.0)
    rows = [Outcome("a", 64, 0.5, None, seed, loss) for seed, loss in zip(seeds, losses, strict=True)]
    rows += [Outcome("a", 64, 1.0, None, None, loss) for loss in (INF, INF, 5.0)]
    optimum = analyse(rows).arms[0].optima[0]
    assert optimum.best_loss == pytest.approx(3.0)
    assert (optimum.runs, optimum.diverged) == (6, 2)


def test_regret_is_interpolated_between_runs_unknown_outside_the_grid_and_infinite_next_to_divergence():
    rows = rows_of(lambda arm, width, lr, wd, seed: INF if lr > 0.05 else math.log2(lr / 0.005) ** 2, widths=(64,))
    results = {lr: analyse(rows, lr=lr).arms[0].regrets[0] for lr in (0.01, 0.01 * 2**0.25, 0.06, 0.08, 0.1)}
    assert [r.reached for r in results.values()] == ["run", "interpolated", "diverged", "diverged", "outside the grid"]
    assert [r.regret for r in results.values()] == pytest.approx([1, 1.75, INF, INF, math.nan], nan_ok=True)


def test_regret_is_measured_at_the_lr_of_the_best_run_at_the_proxy():
    def loss(arm, width, lr, wd, seed):
        return abs(math.log2(lr / (0.01 * width / 64)))

    rows = rows_of(loss, widths=(64, 128, 256))
    assert [r.regret for r in analyse(rows).arms[0].regrets] == pytest.approx([0, 1, 2])
    assert [r.regret for r in analyse(rows, proxy=128).arms[0].regrets] == pytest.approx([1, 0, 1])


def test_a_regret_of_zero_has_an_interval_that_says_how_much_chance_may_hide():
    def loss(arm, width, lr, wd, seed):
        return 0.1 * math.log2(lr / 0.01) ** 2

    quiet, loud = (analyse(rows_of(loss, widths=(64, 128)), noise=noise).arms[0].regrets[1] for noise in (1e-6, 0.1))
    assert quiet.regret == loud.regret == 0
    assert (quiet.low, quiet.high) == (0, 0)
    assert loud.low == 0
    assert 0.05 < loud.high < 0.5
    at = analyse(rows_of(loss, widths=(64,)), lr=0.02, noise=0.01).arms[0].regrets[0]
    assert at.regret == pytest.approx(0.1, abs=1e-3)
    assert at.low < at.regret < at.high < at.low + 0.08


def test_a_curve_is_built_from_its_rows_in_linear_time():
    """A list of seeds that every row searches makes the time quadratic. Here a seed counts how often it is compared."""
    compared = 0

    class Seed(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    rows = [Outcome("a", 64, LRS[i % 6], None, Seed(i), float(i % 6)) for i in range(600)]
    curve = Curve.of(rows)
    assert compared < 10 * len(rows)
    assert list(curve.mean) == [0, 1, 2, 3, 4, 5]
    assert curve.runs.sum() == len(rows)


def test_every_weight_decay_is_analysed_by_itself_and_the_ridge_joins_them(random):
    slope = random.uniform(-1.2, 1.2)

    def loss(arm, width, lr, wd, seed):
        x, y = math.log2(lr / 0.014), math.log2(wd / 2)
        return 2 + 0.05 * (x - slope * y) ** 2 + 0.01 * y**2 + 1e-4 * random.normal()

    lrs = [0.014 * 2.0**i for i in range(-5, 6)]
    rows = rows_of(loss, widths=(64,), lrs=lrs, decays=(0.5, 1.0, 2.0, 4.0, 8.0), seeds=("0", "1"))
    found = analyse(rows)
    assert [arm.weight_decay for arm in found.arms] == [0.5, 1, 2, 4, 8]
    (line,) = found.ridges
    assert line.slope == pytest.approx(slope, abs=0.01)
    assert line.intercept + line.slope == pytest.approx(math.log2(0.014), abs=0.01)  # at weight decay 2
    assert line.slope_low < line.slope < line.slope_high < line.slope_low + 0.02
    hessian = np.array([[0.1, -0.1 * slope], [-0.1 * slope, 0.1 * slope**2 + 0.02]])
    x, y = np.linalg.eigh(hessian)[1][:, 0]
    assert line.axis == pytest.approx(x / y, abs=0.01)
    assert "best lr ∝ wd^" in table(found, outcomes.Outcomes("x.csv", "loss", tuple(rows)))


def test_a_ridge_leaves_out_decays_whose_optimum_is_at_the_edge():
    def loss(arm, width, lr, wd, seed):
        return (math.log2(lr / 0.02) + math.log2(wd)) ** 2

    decays = (0.125, 0.5, 1.0, 2.0, 4.0)
    curves = curves_of(rows_of(loss, widths=(64,), decays=decays))
    found = ridge(curves, 1e-3)
    assert found.at_edge == (0.125,)
    assert found.weight_decay == (0.5, 1, 2, 4)
    assert found.slope == pytest.approx(-1)
    assert ridge(curves[:3], 1e-3) is None


def test_an_exponent_is_the_slope_of_a_line_in_logarithms(random):
    widths = np.array([64, 128, 256, 512])
    values = np.exp(random.normal(size=(3, 4)) * 0.1) * widths**0.75
    slopes = np.polyfit(np.log(widths), np.log(values).T, 1)[0]
    many, one = exponent(widths, values), exponent(widths, values[0])
    assert many.slope == pytest.approx(slopes.mean())
    assert many.spread == pytest.approx(slopes.std(ddof=1))
    assert many.half == pytest.approx(4.303 * slopes.std(ddof=1) / 3**0.5)
    _, covariance = np.polyfit(np.log(widths), np.log(values[0]), 1, cov=True)
    assert one.slope == pytest.approx(slopes[0])
    assert one.half == pytest.approx(4.303 * covariance[0, 0] ** 0.5)
    assert math.isnan(exponent(widths[:2], values[0, :2]).half)
    with pytest.raises(ValueError, match=r"values hold -1\.0, which has no logarithm"):
        exponent(widths, [1, 2, 3, -1])
    with pytest.raises(ValueError, match=r"widths of shape \(4,\) with values of shape \(3,\)"):
        exponent(widths, [1, 2, 3])


def test_students_quantiles_hold_95_percent():
    for freedom in (1, 2, 3, 5, 10, 17, 30, 31, 100):
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        x = np.linspace(-student(freedom), student(freedom), 200_001)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert float(np.sum(density[1:] + density[:-1]) / 2 * (x[1] - x[0])) == pytest.approx(0.95, abs=2e-4)
    assert len(STUDENT) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proxy": 65}, "no run has the proxy's width 65. Widths are 64, 128"),
        ({"lr": -1.0}, "lr=-1.0 is not a positive number"),
        ({"noise": 0.0}, "noise=0.0 is not a positive number"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments, message):
    rows = rows_of(lambda *_: 1.0, widths=(64, 128))
    with pytest.raises(ValueError, match=message):
        analyse(rows, **arguments)
    with pytest.raises(ValueError, match="no runs"):
        analyse([], **arguments)


def test_the_command_prints_every_arm_and_writes_the_numbers(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["transfer", str(KOSSON), "--lr", "0.008", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "kosson2025_fig1.csv: 118 runs, 5 of them diverged; losses are column 'loss'; proxy width 128" in printed
    line = next(line for line in printed.split("\n\n")[2].splitlines() if line.startswith("2048"))
    expected = "2048 0.0453 0.029 to 0.13 0.032 2.7980 0.008 2.8540 0.056 (0.035 to 0.086) 1 of 8 diverged"
    assert " ".join(line.split()) == expected
    assert "none         128 to 2048" in printed
    assert "not resolved: best lr not inside the grid at width 1024" in printed
    written = json.loads(out.read_text())
    assert [arm["name"] for arm in written["arms"]] == ["independent", "standard", "none"]
    assert written["arms"][1]["regrets"][-1]["regret"] == pytest.approx(0.056)
    assert written["arms"][2]["optima"][3]["high"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such.csv"], "cannot read 'no/such.csv'"),
        ([str(KOSSON), "--proxy", "100"], "no run has the proxy's width 100"),
        ([str(KOSSON), "--loss", "bits"], "no column 'bits'"),
        ([str(KOSSON), "--noise", "0"], "--noise: '0' is not a positive number"),
        ([str(KOSSON), "--plot", "x.jpg"], "--plot: 'x.jpg' ends in none of .svg, .png, .pdf"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_gives_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_weight_decays_that_follow_the_width_give_a_note():
    rows = rows_of(lambda arm, width, lr, wd, seed: 1.0, widths=(64,), decays=(1.0,))
    rows += rows_of(lambda arm, width, lr, wd, seed: 1.0, widths=(128,), decays=(2.0,))
    text = " ".join(table(analyse(rows), outcomes.Outcomes("x.csv", "loss", tuple(rows))).split())
    assert "a has one width at weight decay 1, so no drift. Weight decays have to be base values" in text
