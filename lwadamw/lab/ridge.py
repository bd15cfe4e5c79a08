"""Ridge: the pairs of learning rate and weight decay at one width that give about the same loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lwadamw.state.arrays import Array

from .curves import Curve, interval, lowest, slope_weights

FEWEST_POINTS: Final = 8  # The quadratic form is fitted to at least this many runs. It has six coefficients.


@dataclass(frozen=True, slots=True)
class Ridge:
    """Best learning rate as a function of the weight decay: lr_opt = 2^intercept wd^slope.

    A slope of -1 means that lr wd decides the loss, so the relative update does. A slope of +1 means that lr / wd decides
    the loss, so the size of the weights in the steady state does.

    Args:
        arm: name of the arm.
        width: width of the model.
        weight_decay: weight decays whose optimum lies inside the grid of learning rates. The line is fitted to these.
        lr: the optimum at each of these weight decays.
        at_edge: weight decays that were left out, because their optimum is at the edge of the grid.
        slope: slope of log lr_opt against log wd.
        slope_low: lower end of the 95 % interval of the slope.
        slope_high: upper end of the 95 % interval of the slope.
        intercept: log2 lr_opt at a weight decay of 1.
        axis: slope of the direction in which a quadratic form of the loss rises least. None if there are too few runs.
    """

    arm: str
    width: int
    weight_decay: tuple[float, ...]
    lr: tuple[float, ...]
    at_edge: tuple[float, ...]
    slope: float
    slope_low: float
    slope_high: float
    intercept: float
    axis: float | None


def ridge(curves: Sequence[Curve], noise: float) -> Ridge | None:
    """Fit a line through the optima of several weight decays, and find the flattest direction around the lowest losses.

    The line and the direction differ where the valley is wide: the line goes through the best lr at each weight decay,
    and the direction is the long axis of the contours.

    Args:
        curves: curves of one arm at one width, one per weight decay. A weight decay of 0 has no logarithm and is left out.
        noise: standard deviation of the loss of one run. The interval holds the slopes of 95 % of refits to losses that
            are moved at random by this noise.

    Returns:
        The ridge, or None if fewer than three weight decays have their optimum inside the grid.
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
    """Return the slope d log2 lr / d log2 wd of the flattest direction of a quadratic form.

    The form is fitted to the better half of the runs.
    """
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
