"""The planner finds the optimum of parabolas that it does not know, with few runs, and says when to stop."""

import math

import numpy as np
import pytest

from lwadamw.lab.curves import lowest
from lwadamw.lab.outcomes import Outcome
from lwadamw.lab.ridge import ridge
from lwadamw.lab.transfer import analyse, curves_of
from lwadamw.lab.transfer_next import suggest

CURVATURE = 0.05


def loop(optimum, start, *, noise=0.0, level=0.002, diverges_above=math.inf, seed=0, most=40):
    """Run what the planner says until it says nothing more. Return the curve and the number of runs."""
    generator = np.random.default_rng(seed)
    seeds = {}

    def run(octave):
        seeds[octave] = seeds.get(octave, -1) + 1
        loss = 3 + CURVATURE * (octave - optimum) ** 2 + noise * generator.standard_normal()
        return Outcome("a", 64, 2.0**octave, None, str(seeds[octave]), loss if octave < diverges_above else math.inf)

    rows = [run(octave) for octave in start]
    while len(rows) < most:
        (curve,) = curves_of(rows)
        chosen = suggest(curve, level)
        if not chosen.lr:
            break
        rows += [run(math.log2(lr)) for lr in chosen.lr]
    (curve,) = curves_of(rows)
    return curve, len(rows)


@pytest.mark.parametrize("start", [(-14.0,), (-3.0,), (-14.0, -13.0), (-6.0, -3.0), (-9.0, -8.0, -7.0)])
@pytest.mark.parametrize("optimum", [-10.0, -7.6, -5.25])
def test_the_optimum_is_found_from_any_start(optimum, start):
    curve, runs = loop(optimum, start)
    assert lowest(curve.log2_lr, curve.mean)[0] == pytest.approx(optimum, abs=0.01)
    assert runs <= 14


def test_a_grid_of_three_around_the_optimum_needs_one_run_at_most():
    assert loop(-8.0, (-9.0, -8.0, -7.0))[1] == 3
    assert loop(-7.6, (-9.0, -8.0, -7.0))[1] == 4


def test_with_noise_more_seeds_are_run_until_the_interval_costs_less_than_the_noise():
    costs, counts = [], []
    for seed in range(20):
        curve, runs = loop(-7.6, (-9.0, -8.0, -7.0), noise=0.01, level=0.01, seed=seed)
        costs.append(CURVATURE * float(lowest(curve.log2_lr, curve.mean)[0] + 7.6) ** 2)
        counts.append(runs)
    assert np.mean(np.array(costs) <= 0.01) >= 0.9
    assert max(counts) < 40
    assert max(counts) > 6


def test_next_to_divergence_the_step_is_halved_and_above_it_nothing_is_run():
    curve, runs = loop(-5.0, (-8.0, -7.0, -6.0, -5.0), diverges_above=-5.6)
    assert curve.log2_lr[curve.best] == pytest.approx(-5.6, abs=0.3)
    assert runs <= 10
    everything = curves_of([Outcome("a", 64, 2.0**-3, None, None, math.inf)])[0]
    assert suggest(everything, 0.01).lr == (2.0**-5,)


@pytest.mark.parametrize(("losses", "lr"), [((3.0, 2.0, 1.0), 0.8), ((1.0, 2.0, 3.0), 0.05)])
def test_an_optimum_at_the_edge_is_answered_with_a_run_beyond_it(losses, lr):
    rows = [Outcome("a", 64, x, None, None, y) for x, y in zip((0.1, 0.2, 0.4), losses, strict=True)]
    (chosen,) = analyse(rows).next
    assert chosen.lr == pytest.approx((lr,))
    assert "of the grid, so the optimum may be" in chosen.why


@pytest.mark.parametrize("slope", [-1.0, -0.5])
@pytest.mark.parametrize("best_decay", [-4.0, -1.0])
def test_along_a_ridge_one_line_of_runs_replaces_the_grid(slope, best_decay):
    def loss(octave, decay):
        return 3 + CURVATURE * (octave + 9 - slope * decay) ** 2 + 0.02 * (decay - best_decay) ** 2

    rows = [Outcome("a", 64, 2.0**x, 2.0**wd, None, loss(x, wd)) for x in range(-12, 1) for wd in (-5.0, -4.0, -3.0)]
    found = analyse(rows, noise=0.001)
    (line,) = [n for n in found.next if "along the ridge" in n.why]
    assert f"lr ∝ wd^{slope:+.2f}" in line.why
    if best_decay > -3:
        (lr,), (decay,) = line.lr, line.weight_decay
        assert math.log2(decay) == pytest.approx(-2)
        assert math.log2(lr) == pytest.approx(-9 + slope * -2, abs=0.05)
    else:
        assert line.lr == ()
    curves = curves_of(rows)
    assert ridge(curves, 0.001).slope == pytest.approx(slope, abs=0.02)
