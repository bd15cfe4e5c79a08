"""Laws: how a statistic follows from learning rate, weight decay and width, so that a target run can be predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ..width.steady_state import relative_update_of, weight_rms_of
from .profile import SegmentProfile, geometric_mean
from .spectrum import is_pack

Quantity = Callable[[SegmentProfile], float]  # a number that a segment has; NaN where it is not known


def value_of(statistic: str) -> Quantity:
    """Return the function that reads a statistic from a segment. It gives NaN where the segment does not have it."""
    return lambda segment: segment.values.get(statistic, math.nan)


def mean_of(quantity: Quantity, segments: Sequence[SegmentProfile]) -> float:
    """Return the geometric mean of a quantity over segments. It is NaN if some value is not known or not positive."""
    return geometric_mean([quantity(segment) for segment in segments])


def _steady_rms(segment: SegmentProfile) -> float:
    return float(weight_rms_of(segment.lr, segment.weight_decay)) if segment.weight_decay else math.nan


def _steady_update(segment: SegmentProfile) -> float:
    # A profile does not know the betas of a segment. They cancel in the ratio of two runs with the same betas.
    return float(relative_update_of(segment.lr, segment.weight_decay, 0.0))


def _expected_update(segment: SegmentProfile) -> float:
    """Return the steady relative update of a weight whose RMS is expected_rms instead of steady_rms."""
    update, steady, expected = (value_of(key)(segment) for key in ("steady_update", "steady_rms", "expected_rms"))
    return update * steady / expected if expected else math.nan


def _fan_in(segment: SegmentProfile) -> float:
    return math.nan if segment.fan_in is None else float(segment.fan_in)


def _m(segment: SegmentProfile) -> float:
    return segment.m


def _random_top(segment: SegmentProfile) -> float:
    """Return the top singular value of a matrix of this shape with independent entries of RMS 1: sqrt(rows) + sqrt(columns)."""
    shape = segment.shape[1:] if is_pack(segment.shape, segment.fan_in) else segment.shape
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.nan, math.nan)
    return math.sqrt(rows) + math.sqrt(columns)


# A factor of a law is a list of quantities that are proportional to the same thing, the best one first. What the monitor
# expected is better than the steady state of lr and weight decay: the monitor knows the betas and follows the schedule.
_expected_rms: Final = value_of("expected_rms")
_RMS: Final = (_expected_rms, value_of("steady_rms"), _steady_rms)
_UPDATE: Final = (_expected_update, value_of("steady_update"), _steady_update)
_WIDTH: Final = (_fan_in, _m)
_LAGGING: Final = (_expected_rms, _expected_update)  # these follow the schedule as slowly as the weights do


def _power(exponent: float, factor: Sequence[Quantity]) -> tuple[Quantity, ...]:
    """Return the factor with every quantity raised to a power."""

    def raised(quantity: Quantity) -> Quantity:
        return lambda segment: quantity(segment) ** exponent

    return tuple(map(raised, factor))


# Statistic -> the factors that it is proportional to the product of. `lwadamw.monitor.comparison.compare` lists the sources.
LAWS: Final[Mapping[str, tuple[tuple[Quantity, ...], ...]]] = {
    "weight_rms": (_RMS,),
    "relative_update": (_UPDATE,),
    "rotation": (_UPDATE,),
    "top": (_RMS, _power(0.75, _WIDTH)),
    "bulk": (_RMS, (_random_top, *_power(0.5, _WIDTH))),
    "gain": (_RMS, _power(0.75, _WIDTH)),
    "representation_change": (_UPDATE,),
}

# The bulk is left out: it is what remains after the top directions are removed. In a matrix that has learnt many directions
# of low rank, only little remains.
DEFAULTS: Final = tuple(key for key in LAWS if key != "bulk")


def predicted_ratio(
    statistic: str, proxy: Sequence[SegmentProfile], target: Sequence[SegmentProfile], settled: bool = False
) -> float:
    """Return what a statistic of the target, divided by the statistic of the proxy, should be.

    Args:
        statistic: name of the statistic.
        proxy: segments of one type in the run of the proxy.
        target: segments of the same type in the run of the target.
        settled: whether to predict the steady state of the present learning rates, as if the weights had followed them. By
            default, the prediction is of the weights as far as they have followed.

    Returns:
        The ratio. NaN if there is no law for the statistic, if some segment has no weight decay, or if a factor of the law is
        not known in both runs.
    """
    if statistic not in LAWS or not all(segment.lr * segment.weight_decay > 0 for segment in (*proxy, *target)):
        return math.nan
    factors = [
        [quantity for quantity in factor if not (settled and quantity in _LAGGING)] for factor in LAWS[statistic]
    ]
    return math.prod(_first_known_ratio(factor, proxy, target) for factor in factors)


def _first_known_ratio(
    factor: Sequence[Quantity], proxy: Sequence[SegmentProfile], target: Sequence[SegmentProfile]
) -> float:
    """Return target over proxy of the first quantity that is known in both runs."""
    ratios = (mean_of(quantity, target) / mean_of(quantity, proxy) for quantity in factor)
    return next((ratio for ratio in ratios if not math.isnan(ratio)), math.nan)
