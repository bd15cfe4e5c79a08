"""Shape: whether the loss around an optimum is the parabola in log lr that the optimum is read from."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from .curves import VALLEY, Curve, lowest

# Quantiles 0.999 of chi-squared over its degrees of freedom, for 1 and 2 degrees.
UNLIKELY: Final = {1: 10.83, 2: 13.82 / 2}
MOVED: Final = 0.25  # octaves between the lowest points of two fits, above which the shape counts
HILL: Final = 3.0  # standard deviations by which a point between two lower ones has to stick out


def problem(curve: Curve, noise: float) -> str:
    """Say why the loss is no parabola around its lowest point, as far as it matters for the optimum. Empty if it is one.

    Args:
        curve: losses of one arm at one width and one weight decay.
        noise: standard deviation of the loss of one run.
    """
    if not noise > 0 or curve.edge == "no run ended":
        return ""
    hill = _hill(curve, noise)
    if hill or curve.edge:
        return hill
    near = slice(max(0, curve.best - VALLEY), curve.best + VALLEY + 1)
    known = np.isfinite(curve.mean[near])
    x, y, runs = curve.log2_lr[near][known], curve.mean[near][known], curve.runs[near][known]
    freedom = len(x) - 3
    if freedom not in UNLIKELY:
        return ""
    weights = np.sqrt(runs) / noise
    middle = x - curve.log2_lr[curve.best]
    parabola = np.polyfit(middle, y, 2, w=weights)
    rest = (y - np.polyval(parabola, middle)) * weights
    if rest @ rest / freedom < UNLIKELY[freedom]:
        return ""
    through_three = float(lowest(curve.log2_lr, curve.mean)[0]) - curve.log2_lr[curve.best]
    bottom = _lowest_of_cubic(np.polyfit(middle, y, 3, w=weights), middle[0], middle[-1])
    moved = bottom - through_three
    if math.isnan(moved) or abs(moved) < MOVED:
        return ""
    lr = 2.0 ** (bottom + curve.log2_lr[curve.best])
    cubic = f"a cubic through {len(x)} runs is lowest at lr {lr:.3g}"
    return f"no parabola: {cubic}, {moved:+.2f} octaves from the parabola through 3"


def _hill(curve: Curve, noise: float) -> str:
    """Say where the loss rises and falls again, by more than noise explains."""
    y = np.where(np.isfinite(curve.mean), curve.mean, np.inf)
    step = HILL * noise * np.sqrt(2 / curve.runs)
    for i in range(1, len(y) - 1):
        left, right = int(np.argmin(y[:i])), i + 1 + int(np.argmin(y[i + 1 :]))
        if np.isfinite(y[i]) and y[i] - max(y[left], y[right]) > step[i]:
            return f"no parabola: two valleys, at lr {curve.lr[left]:g} and {curve.lr[right]:g}"
    return ""


def _lowest_of_cubic(coefficients: np.ndarray[tuple[int], np.dtype[np.float64]], low: float, high: float) -> float:
    """Return where a cubic has its minimum between two bounds. NaN if it has none there."""
    roots = np.roots(np.polyder(coefficients))
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and low <= r.real <= high]
    rising = [r for r in inside if np.polyval(np.polyder(coefficients, 2), r) > 0]
    return rising[0] if rising else math.nan
