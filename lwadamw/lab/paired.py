"""Differences between the drifts of arms, from runs that the arms share and runs that they do not share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .curves import Curve, combined, interval, lowest, noise_of, slope_weights

NOISE = 0.01  # the noise of a run where no arm has two seeds


@dataclass(frozen=True, slots=True)
class Difference:
    """The drift of an arm minus the drift of another arm.

    Args:
        arm: name of the arm.
        other: name of the other arm.
        weight_decay: base weight decay of both. None: the file does not have it.
        slope: difference of the slopes, in octaves of lr per octave of width.
        slope_low: lower end of the 95 % interval. It is -inf if an optimum at the edge of the grid leaves it open.
        slope_high: upper end of the 95 % interval; inf if it is open.
        shared: widths at which both arms have the same runs.
    """

    arm: str
    other: str
    weight_decay: float | None
    slope: float
    slope_low: float
    slope_high: float
    shared: tuple[int, ...]


def differences(curves: Sequence[Curve], noise: float = NOISE) -> list[Difference]:
    """Compare the drifts of all arms in pairs.

    At the width of the proxy all rules have the same values, so arms often have the same runs there. Whatever moves the
    optimum of these runs moves it for both arms, and the difference does not see it. So a difference is known more
    precisely than each of its two drifts. In every refit, a curve that two arms share is moved once for both. All other
    curves are moved independently of each other.

    Args:
        curves: the curves of all arms, as `transfer.curves_of` returns them.
        noise: standard deviation of the loss of one run, for arms without two seeds.

    Returns:
        One difference for each pair of arms with equal weight decay and at least two widths in common. The arm that comes
        later in `curves` comes first in the pair.
    """
    names = list(dict.fromkeys(curve.arm for curve in curves))
    level = {name: noise_of([c for c in curves if c.arm == name]) or noise for name in names}
    found = []
    for decay in dict.fromkeys(curve.weight_decay for curve in curves):
        arms = {name: {c.width: c for c in curves if (c.arm, c.weight_decay) == (name, decay)} for name in names}
        for other, arm in combinations(names, 2):
            widths = [w for w, c in arms[arm].items() if w in arms[other] and _ended(c) and _ended(arms[other][w])]
            if len(widths) > 1:
                pairs = [(arms[arm][width], arms[other][width]) for width in sorted(widths)]
                found.append(_difference(pairs, level[arm], level[other]))
    return sorted(found, key=lambda d: (names.index(d.arm), names.index(d.other)))


def _difference(pairs: Sequence[tuple[Curve, Curve]], noise: float, others: float) -> Difference:
    # Two generators, so that a pair does not depend on the other pairs of the file.
    ours, theirs = np.random.default_rng(0), np.random.default_rng(1)
    weights = slope_weights(np.log2([curve.width for curve, _ in pairs]))
    fit, low, high, shared = [], [], [], []
    for curve, other in pairs:
        if _same(curve, other):
            shared.append(curve.width)
            nothing = np.zeros(len(curve.redraw(noise, ours)))
            fit.append(0.0)
            low.append(nothing)
            high.append(nothing)
            continue
        mine, its = curve.bounds(curve.redraw(noise, ours)), other.bounds(other.redraw(others, theirs))
        fit.append(float(lowest(curve.log2_lr, curve.mean)[0] - lowest(other.log2_lr, other.mean)[0]))
        low.append(mine[0] - its[1])
        high.append(mine[1] - its[0])
    slope = float(weights @ np.array(fit))
    ends = interval(*combined(weights, np.array(low), np.array(high)))
    first, second = pairs[0]
    return Difference(first.arm, second.arm, first.weight_decay, slope, *ends, tuple(shared))


def _ended(curve: Curve) -> bool:
    return bool(np.isfinite(curve.mean).any())


def _same(curve: Curve, other: Curve) -> bool:
    return (
        curve.seeds == other.seeds and np.array_equal(curve.lr, other.lr) and np.array_equal(curve.losses, other.losses)
    )
