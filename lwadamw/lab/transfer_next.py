"""The next runs: which learning rate to try, given the runs so far, and along which line where there is a ridge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .curves import Curve, interval, lowest
from .ridge import Ridge

NEAR: Final = 0.25  # octaves: a run this near to the fitted optimum tells as much as one at the optimum
WIDEST: Final = 2.0  # octaves between neighbours, above which a parabola through them is not trusted
STEP: Final = 1.0  # octaves beyond the edge, where the grid has only one learning rate
DOWN: Final = 2.0  # octaves below the lowest lr, where every run diverged


@dataclass(frozen=True, slots=True)
class Next:
    """What to run next for one arm at one width.

    Args:
        arm: name of the arm.
        width: width of the model.
        lr: base learning rates to run, in this order. Empty if no run is needed.
        weight_decay: base weight decay of these runs. For a sweep along a ridge, each learning rate has its own.
        seeds: whether the learning rates have been run, and another seed is meant.
        why: the reason, a sentence.
    """

    arm: str
    width: int
    lr: tuple[float, ...]
    weight_decay: tuple[float | None, ...]
    seeds: bool
    why: str


def suggest(curve: Curve, noise: float) -> Next:
    """Choose the next learning rate of one curve.

    If the best learning rate is at the edge of the grid, the next one is beyond the edge. Next to a diverged run it is half-way
    to that run. Inside the grid it is the fitted optimum, unless a run is within a quarter of an octave of it. If then the
    noise may have moved an optimum from the edge to the inside, the next one is beyond that edge. Otherwise only noise is left:
    further seeds of the three runs around the optimum make it smaller. No run is needed if even the ends of the optimum's
    interval cost less than the noise of a run.

    Args:
        curve: losses of one arm at one width and one weight decay.
        noise: standard deviation of the loss of one run.
    """
    x, best = curve.log2_lr, curve.best
    if len(x) == 1 and not curve.edge.startswith("no run"):
        return _next(curve, [x[0] - STEP, x[0] + STEP], "there is only one lr")
    if curve.edge == "no run ended":
        return _next(curve, [x[0] - DOWN], "every run diverged")
    if curve.edge == "lowest lr":
        return _next(
            curve, [x[0] - _beyond(x[:2])], "the best lr is the lowest of the grid, so the optimum may be below it"
        )
    if curve.edge == "highest lr":
        return _next(
            curve, [x[-1] + _beyond(x[-2:])], "the best lr is the highest of the grid, so the optimum may be above it"
        )
    if curve.edge:
        sides = [i for i in (best - 1, best + 1) if 0 <= i < len(x) and not np.isfinite(curve.mean[i])]
        gap = max(abs(x[i] - x[best]) for i in sides)
        if gap > NEAR:
            return _next(curve, [(x[best] + x[i]) / 2 for i in sides], "the best lr is next to a diverged run")
        return _next(curve, [], f"the next lr has diverged, and it is only {gap:.2g} octaves away")
    bottom = float(lowest(x, curve.mean)[0])
    around = np.array([best - 1, best, best + 1])
    if x[best + 1] - x[best - 1] > 2 * WIDEST or np.abs(x - bottom).min() > NEAR:
        return _next(curve, [bottom], "the fitted optimum is between two runs")
    low, high = interval(*curve.bounds(curve.redraw(noise, np.random.default_rng(0))))
    for end, open_ in ((0, low == -math.inf), (-1, high == math.inf)):
        if open_ and np.isfinite(curve.mean[end]):
            step = -_beyond(x[:2]) if end == 0 else _beyond(x[-2:])
            return _next(curve, [x[end] + step], f"with this noise the optimum may be beyond the lr {2 ** x[end]:.3g}")
    curvature = np.polyfit(x[around] - bottom, curve.mean[around], 2)[0]
    cost = float(curvature * max(bottom - low, high - bottom) ** 2)
    if cost <= noise:
        return _next(
            curve,
            [],
            f"the optimum is {2**bottom:.3g}; the ends of its interval cost {cost:.2g}, less than the noise of a run",
        )
    why = f"the runs are near enough, and only noise is left: the ends of the interval cost {cost:.2g}"
    return _next(curve, list(x[around]), why, seeds=True)


def along(found: Ridge, curves: Sequence[Curve], noise: float) -> Next:
    """Choose the next runs along a ridge, where the lowest losses of all weight decays lie.

    The lowest loss of every weight decay is a curve over the weight decay. Its next point is chosen like that of a curve over
    the learning rate, and its learning rate is that of the ridge. So one line of runs replaces a grid.

    Args:
        found: the ridge.
        curves: curves of its arm and width, one per weight decay.
        noise: standard deviation of the loss of one run.
    """
    of_ridge = sorted((c for c in curves if c.weight_decay in found.weight_decay), key=lambda c: c.weight_decay or 0.0)
    decays = np.array([c.weight_decay for c in of_ridge], dtype=np.float64)
    line = Curve(
        found.arm,
        found.width,
        None,
        (),
        decays,
        np.array([[c.mean[c.best] for c in of_ridge]]),
        np.array([c.runs[c.best] for c in of_ridge]),
    )
    chosen = suggest(line, noise)
    lr = tuple(float(2.0 ** (found.intercept + found.slope * math.log2(wd))) for wd in chosen.lr)
    why = chosen.why.replace("best lr", "best weight decay").replace("the next lr", "the next weight decay")
    why = f"along the ridge, lr ∝ wd^{found.slope:+.2f}: {why}"
    return Next(found.arm, found.width, lr, chosen.lr, chosen.seeds, why)


def _beyond(x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return how far to go beyond the edge, in octaves: as far as the last step of the grid."""
    return float(x[1] - x[0]) if len(x) > 1 else STEP


def _next(curve: Curve, x: Sequence[float], why: str, seeds: bool = False) -> Next:
    lr = tuple(float(2.0**value) for value in x)
    return Next(curve.arm, curve.width, lr, (curve.weight_decay,) * len(lr), seeds, why)
