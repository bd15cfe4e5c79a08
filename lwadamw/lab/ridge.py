"""Ridge: which pairs of learning rate and weight decay are about as good, at one width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lwadamw.state.arrays import Array

from .curves import Curve, interval, lowest, slope_weights

FEWEST_POINTS: Final = 8  # of the quadratic form, which has six coefficients


@dataclass(frozen=True, slots=True)
class Ridge:
    """Best learning rate against weight decay: lr_opt = 2^intercept wd^slope.

    slope -1: lr wd is what matters, so the relative update. slope +1: lr / wd, so the weights' steady state size.
    """

    arm: str
    width: int
    weight_decay: tuple[float, ...]  # those with an optimum inside their grid of learning rates; the line is from these
    lr: tuple[float, ...]  # their optima
    at_edge: tuple[float, ...]  # the weight decays left out
    slope: float
    slope_low: float  # 95 % interval
    slope_high: float
    intercept: float  # of log2 lr_opt
    axis: float | None  # slope of the direction in which a quadratic form of the loss rises least; None: too few runs


def ridge(curves: Sequence[Curve], noise: float) -> Ridge | None:
    """Line through the optima of several weight decays, and the flattest direction of the loss around the lowest.

    The two differ where the valley is wide: the line has the best lr at each decay, the axis is that of the contours.

    Args:
        curves: of one arm and one width, one per weight decay.
        noise: standard deviation of a run's loss; the interval holds 95 % of refits with losses moved by it.

    Returns:
        None with fewer than three weight decays whose optimum is inside the grid; decays of 0 have no logarithm.
    """
    curves = [c for c in curves if c.weight_decay]
    inside = [c for c in curves if c.edge == ""]
    if len(inside) < 3:
        return None
    generator = np.random.default_rng(0)
    decays = [c.weight_decay or 0.0 for c in inside]
    x = np.log2(decays)
    fits = np.array([lowest(c.log2_lr, c.mean)[0] for c in inside])
    draws = np.array([lowest(c.log2_lr, c.redraw(noise, generator)) for c in inside])
    weights = slope_weights(x)
    slope = float(weights @ fits)
    low, high = interval(weights @ draws)
    return Ridge(
        inside[0].arm,
        inside[0].width,
        tuple(decays),
        tuple(float(2.0**fit) for fit in fits),
        tuple(c.weight_decay or 0.0 for c in curves if c.edge),
        slope,
        low,
        high,
        float(fits.mean() - slope * x.mean()),
        _axis(curves),
    )


def _axis(curves: Sequence[Curve]) -> float | None:
    """Slope d log2 lr / d log2 wd of the flattest direction of a quadratic form through the better half of the runs."""
    points = np.array([(c.log2_lr[j], np.log2(c.weight_decay or 0.0), y) for c in curves for j, y in enumerate(c.mean)])
    points = points[np.isfinite(points[:, 2])]
    points = points[np.argsort(points[:, 2], kind="stable")][: max(FEWEST_POINTS, len(points) // 2)]
    x, y = (points[:, :2] - points[:, :2].mean(axis=0)).T
    terms = np.stack([np.ones_like(x), x, y, x**2, x * y, y**2], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, points[:, 2], rcond=None)
    if len(points) < FEWEST_POINTS or rank < terms.shape[1]:
        return None
    xx, xy, yy = coefficients[3:]
    hessian: Array = np.array([[2 * xx, xy], [xy, 2 * yy]])
    along_lr, along_wd = np.linalg.eigh(hessian)[1][:, 0]
    return float(along_lr / along_wd) if along_wd else math.inf
