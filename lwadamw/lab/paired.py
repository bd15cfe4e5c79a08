"""Differences between drifts and regrets of arms, from runs that the arms share and runs that they do not share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lwadamw.state.arrays import Array

from .curves import Curve, combined, interval, lowest, noise_of, slope_weights

NOISE = 0.01  # the noise of a run where no arm has two seeds


@dataclass(frozen=True, slots=True)
class RegretDifference:
    """The regret of an arm minus the regret of another arm, at one width.

    Args:
        width: width of the model.
        value: the difference. NaN if one of the regrets is not a number, because a run diverged or is not there.
        low: lower end of the 95 % interval; NaN if the difference is.
        high: upper end of the 95 % interval; NaN if the difference is.
    """

    width: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The drift and the regrets of an arm minus those of another arm.

    Args:
        arm: name of the arm.
        other: name of the other arm.
        weight_decay: base weight decay of both. None: the file does not have it.
        slope: difference of the slopes, in octaves of lr per octave of width.
        slope_low: lower end of the 95 % interval. It is -inf if an optimum at the edge of the grid leaves it open.
        slope_high: upper end of the 95 % interval; inf if it is open.
        shared: widths at which both arms have the same runs.
        regrets: differences of the regrets, at every width that both arms have. Empty if one of the arms has no learning rate
            whose regret could be known.
    """

    arm: str
    other: str
    weight_decay: float | None
    slope: float
    slope_low: float
    slope_high: float
    shared: tuple[int, ...]
    regrets: tuple[RegretDifference, ...] = ()


def differences(
    curves: Sequence[Curve], noise: float = NOISE, proxy: int | None = None, lr: float | None = None
) -> list[Difference]:
    """Compare the drifts and the regrets of all arms in pairs.

    At the width of the proxy all rules have the same values, so arms often have the same runs there. Whatever moves the
    optimum of these runs moves it for both arms, and the difference does not see it. So a difference is known more
    precisely than each of its two drifts. In every refit, a curve that two arms share is moved once for both. All other
    curves are moved independently of each other. Drifts and regrets are those of the same refits.

    Args:
        curves: the curves of all arms, as `transfer.curves_of` returns them.
        noise: standard deviation of the loss of one run, for arms without two seeds.
        proxy: width whose best run has the learning rate of the regrets. By default the smallest width.
        lr: learning rate of the regrets, instead of that of each arm's best run at the proxy.

    Returns:
        One difference for each pair of arms with equal weight decay and at least two widths in common. The arm that comes
        later in `curves` comes first in the pair.
    """
    names = list(dict.fromkeys(curve.arm for curve in curves))
    level = {name: noise_of([c for c in curves if c.arm == name]) or noise for name in names}
    proxy = min((curve.width for curve in curves), default=0) if proxy is None else proxy
    found = []
    for decay in dict.fromkeys(curve.weight_decay for curve in curves):
        arms = {name: {c.width: c for c in curves if (c.arm, c.weight_decay) == (name, decay)} for name in names}
        for other, arm in combinations(names, 2):
            widths = [w for w, c in arms[arm].items() if w in arms[other] and _ended(c) and _ended(arms[other][w])]
            if len(widths) > 1:
                pairs = [(arms[arm][width], arms[other][width]) for width in sorted(widths)]
                refits = list(_refits(pairs, level[arm], level[other]))
                moved = (moved_lr(arms[arm].get(proxy), lr), moved_lr(arms[other].get(proxy), lr))
                found.append(_difference(refits, moved))
    return sorted(found, key=lambda d: (names.index(d.arm), names.index(d.other)))


def moved_lr(at_proxy: Curve | None, given: float | None) -> float | None:
    """Return the learning rate whose regret counts. None: the arm has no run at the proxy that ended.

    Args:
        at_proxy: the curve of the arm at the proxy, if there is one.
        given: the learning rate that was given, if one was.
    """
    if given is not None:
        return given
    return float(at_proxy.lr[at_proxy.best]) if at_proxy is not None and _ended(at_proxy) else None


@dataclass(frozen=True)
class _Refit:
    """The curves of two arms at one width, and their mean losses in every refit. Shared runs have the same losses in both."""

    curve: Curve
    other: Curve
    drawn: Array
    its: Array
    shared: bool


def _refits(pairs: Sequence[tuple[Curve, Curve]], noise: float, others: float) -> Iterator[_Refit]:
    # Two generators, so that a pair does not depend on the other pairs of the file.
    ours, theirs = np.random.default_rng(0), np.random.default_rng(1)
    for curve, other in pairs:
        drawn, shared = curve.redraw(noise, ours), _same(curve, other)
        yield _Refit(curve, other, drawn, drawn if shared else other.redraw(others, theirs), shared)


def _difference(refits: Sequence[_Refit], moved: tuple[float | None, float | None]) -> Difference:
    weights = slope_weights(np.log2([refit.curve.width for refit in refits]))
    fit, low, high = [], [], []
    for refit in refits:
        curve, other = refit.curve, refit.other
        if refit.shared:
            nothing = np.zeros(len(refit.drawn))
            fit.append(0.0)
            low.append(nothing)
            high.append(nothing)
            continue
        mine, its = curve.bounds(refit.drawn), other.bounds(refit.its)
        fit.append(float(lowest(curve.log2_lr, curve.mean)[0] - lowest(other.log2_lr, other.mean)[0]))
        low.append(mine[0] - its[1])
        high.append(mine[1] - its[0])
    slope = float(weights @ np.array(fit))
    ends = interval(*combined(weights, np.array(low), np.array(high)))
    first, second = refits[0].curve, refits[0].other
    shared = tuple(refit.curve.width for refit in refits if refit.shared)
    mine_at, its_at = moved
    regrets = () if mine_at is None or its_at is None else tuple(_regret(r, mine_at, its_at) for r in refits)
    return Difference(first.arm, second.arm, first.weight_decay, slope, *ends, shared, regrets)


def _regret(refit: _Refit, lr: float, its_lr: float) -> RegretDifference:
    width = refit.curve.width
    value = _regrets(refit.curve, lr, refit.curve.mean[None]) - _regrets(refit.other, its_lr, refit.other.mean[None])
    if not math.isfinite(value[0]):
        return RegretDifference(width, math.nan, math.nan, math.nan)
    drawn = _regrets(refit.curve, lr, refit.drawn) - _regrets(refit.other, its_lr, refit.its)
    return RegretDifference(width, float(value[0]), *interval(drawn))


def _regrets(curve: Curve, lr: float, drawn: Array) -> Array:
    """Return the regret of a learning rate in every draw. It is inf or NaN where the loss is."""
    return np.asarray(curve.losses_at(lr, drawn) - drawn.min(axis=1))


def _ended(curve: Curve) -> bool:
    return bool(np.isfinite(curve.mean).any())


def _same(curve: Curve, other: Curve) -> bool:
    return (
        curve.seeds == other.seeds and np.array_equal(curve.lr, other.lr) and np.array_equal(curve.losses, other.losses)
    )
