"""Exponents: how a quantity grows with width, and how uncertain the exponent is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from .curves import slope_weights

# 97.5 % quantiles of Student's t distribution for 1 to 30 degrees of freedom.
STUDENT: Final[Sequence[float]] = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Exponent:
    """A power law: value = exp(intercept) width^slope.

    Args:
        slope: the exponent.
        half: half the length of the 95 % interval of the slope. NaN if it is not known.
        spread: standard deviation of the slope over seeds. NaN with one seed.
        intercept: logarithm of the value at width 1.
    """

    slope: float
    half: float
    spread: float
    intercept: float

    def __str__(self) -> str:
        return f"{self.slope:+.2f}" + (f" ± {self.half:.2f}" if math.isfinite(self.half) else "")


def exponent(widths: ArrayLike, values: ArrayLike) -> Exponent:
    """Fit log value against log width by least squares, with a 95 % interval of the slope.

    With two or more seeds, each seed has a slope, and the interval is Student's t interval of their mean. With one seed
    the interval follows from the residuals of the fit, which needs at least three widths.

    Args:
        widths: shape [widths], positive, at least two different values.
        values: shape [widths] or [seeds, widths], positive.

    Raises:
        ValueError: the shapes do not fit together, or a value has no logarithm.
    """
    x, y = np.asarray(widths, dtype=np.float64), np.atleast_2d(np.asarray(values, dtype=np.float64))
    if x.ndim != 1 or y.ndim != 2 or y.shape[1] != len(x) or len(np.unique(x)) < 2:
        raise ValueError(
            f"exponent: widths of shape {x.shape} with values of shape {np.shape(values)}. Give [widths], at least two "
            "different ones, and [widths] or [seeds, widths]."
        )
    for name, array in (("widths", x), ("values", y)):
        if not (np.isfinite(array) & (array > 0)).all():
            raise ValueError(
                f"exponent: {name} hold {array.min()}, which has no logarithm. Leave out values that are not positive."
            )
    x, y = np.log(x), np.log(y)
    slopes = y @ slope_weights(x)
    slope, intercept = float(slopes.mean()), float(y.mean() - slopes.mean() * x.mean())
    if len(slopes) > 1:
        spread = float(slopes.std(ddof=1))
        return Exponent(slope, student(len(slopes) - 1) * spread / math.sqrt(len(slopes)), spread, intercept)
    freedom = len(x) - 2
    if not freedom:
        return Exponent(slope, math.nan, math.nan, intercept)
    rest = y[0] - intercept - slope * x
    half = student(freedom) * math.sqrt(float(rest @ rest) / freedom / float(np.sum((x - x.mean()) ** 2)))
    return Exponent(slope, half, math.nan, intercept)


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution.

    Args:
        freedom: degrees of freedom, 1 or more. Beyond 30 the quantile comes from its series in 1/freedom.
    """
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.372 / freedom + 2.82 / freedom**2
