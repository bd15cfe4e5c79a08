"""Comparison of a run with its proxy: what grew, what shrank, and whether the learning rates and decays predict it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..state.names import layer_type
from ..width.steady_state import STEADY_TAUS, relative_update_of, weight_rms_of
from .profile import Layer, Profile, geometric_mean

# Less than what separates neighbouring rules at a width ratio of 4, 4^(1/4) = 1.41 in weight RMS and relative update, and
# about what small models that learn are off by at the end of a run (docs/gain.md).
TOLERANCE: Final = 1.25

Quantity = Callable[[Layer], float]


def _value(key: str) -> Quantity:
    return lambda layer: layer.values.get(key, math.nan)


def _steady_rms(layer: Layer) -> float:
    return float(weight_rms_of(layer.lr, layer.weight_decay)) if layer.weight_decay else math.nan


def _steady_update(layer: Layer) -> float:
    return float(relative_update_of(layer.lr, layer.weight_decay, 0.0))


def _update(layer: Layer) -> float:
    """The steady state's, of a weight that is larger or smaller than steady."""
    update, steady, expected = (_value(key)(layer) for key in ("steady_update", "steady_rms", "expected_rms"))
    return update * steady / expected if expected else math.nan


def _fan_in(layer: Layer) -> float:
    return math.nan if layer.fan_in is None else float(layer.fan_in)


def _m(layer: Layer) -> float:
    return layer.m


def _random(layer: Layer) -> float:
    """Top singular value of a matrix of independent entries, over their RMS."""
    rows, columns = (layer.shape[0], math.prod(layer.shape[1:])) if len(layer.shape) > 1 else (math.nan, math.nan)
    return math.sqrt(rows) + math.sqrt(columns)


# To what a statistic is proportional: a product, and for each factor what tells it, best first. A monitor's own
# expectation is better than the steady state's: it knows betas, and follows a schedule.
_RMS: Final = (_value("expected_rms"), _value("steady_rms"), _steady_rms)
_UPDATE: Final = (_update, _value("steady_update"), _steady_update)
_WIDTH: Final = (_fan_in, _m)


def _power(exponent: float, factors: Sequence[Quantity]) -> tuple[Quantity, ...]:
    def raised(factor: Quantity) -> Quantity:
        return lambda layer: factor(layer) ** exponent

    return tuple(map(raised, factors))


LAWS: Final[Mapping[str, tuple[tuple[Quantity, ...], ...]]] = {
    "weight_rms": (_RMS,),
    "relative_update": (_UPDATE,),
    "rotation": (_UPDATE,),
    "top": (_RMS, _power(0.75, _WIDTH)),
    "bulk": (_RMS, (_random, *_power(0.5, _WIDTH))),
    "gain": (_RMS, _power(0.75, _WIDTH)),
    "representation_change": (_UPDATE,),
}

# Not the bulk: it is a remainder, and that of a matrix that has learnt much of low rank is a small one.
DEFAULTS: Final = tuple(key for key in LAWS if key != "bulk")


@dataclass(frozen=True)
class Row:
    """One statistic of all layers of one type, or of one layer."""

    role: str
    layers: str  # name, with layer numbers as *
    statistic: str
    proxy: float  # geometric mean
    target: float
    predicted: float  # target over proxy; NaN: there is no law, or no decay
    verdict: str  # "as predicted", "grew", "shrank", "too early", "no prediction"

    @property
    def ratio(self) -> float:
        return self.target / self.proxy

    @property
    def off(self) -> float:
        """The ratio over the predicted one."""
        return self.ratio / self.predicted


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    tolerance: float
    unmatched: tuple[str, ...]  # types of layers that only one of the runs has

    @property
    def drifted(self) -> tuple[Row, ...]:
        """The rows that grew or shrank by more than the tolerance, against the prediction."""
        return tuple(row for row in self.rows if row.verdict in ("grew", "shrank"))


def compare(
    proxy: Profile,
    target: Profile,
    tolerance: float = TOLERANCE,
    *,
    statistics: Sequence[str] | None = None,
    by_layer: bool = False,
    after: float = STEADY_TAUS,
) -> Comparison:
    """What each statistic is at the target over what it is at the proxy, against what lr and weight decay predict.

    Predicted from the effective eta and lambda of the two runs, whatever rule they are from, and betas and schedule where
    a monitor has accounted for them. With d the fan_in:

        weight_rms                  sqrt(eta / lambda)             Kosson et al. 2510.19093
        relative_update, rotation   sqrt(eta lambda)               Kosson et al. 2305.17212, 2510.19093
        representation_change       sqrt(eta lambda)               if the alignment ratio stays
        top, gain                   sqrt(eta / lambda) d^(3/4)     observed by Fan et al. 2510.15262; not universal
        bulk                        sqrt(eta / lambda) (sqrt(rows) + sqrt(columns))     independent entries

    Layers are compared by type, their numbers replaced by *, so depths may differ: geometric means on both sides. A row of
    which any layer in either run had not been trained for `after` tau when its averages began is "too early", and layers
    without decay have no prediction.

    Args:
        proxy, target: profiles of the two runs.
        tolerance: factor by which a ratio may differ from the predicted one, either way.
        statistics: which, also such as have no prediction; by default those above but bulk, as far as both runs have them.
        by_layer: compare layer by layer, those whose names agree, instead of by type.
        after: tau that must have passed, in which weights forget a factor e of what they were.

    Raises:
        ValueError: the tolerance is not above 1, a statistic is in neither run, or no layer is in both.
    """
    if not tolerance > 1:
        raise ValueError(f"compare: tolerance={tolerance} is not above 1. It is a factor; {TOLERANCE} is the default.")
    known = {key for profile in (proxy, target) for layer in profile.layers for key in layer.values}
    for statistic in statistics or ():
        if statistic not in known:
            raise ValueError(f"compare: no run has the statistic {statistic!r}. They have {', '.join(sorted(known))}.")
    ours, theirs = (_types(profile, by_layer) for profile in (proxy, target))
    common = [key for key in ours if key in theirs]
    if not common:
        raise ValueError(
            f"compare: the runs have no layer in common. The proxy has {_some(ours)}, the target {_some(theirs)}."
        )
    rows = [
        row
        for statistic in statistics or DEFAULTS
        for key in common
        if (row := _row(key, statistic, ours[key], theirs[key], tolerance, after)) is not None
    ]
    unmatched = [layers for _, layers in (*ours, *theirs) if (_, layers) not in common]
    return Comparison(tuple(rows), tolerance, tuple(dict.fromkeys(unmatched)))


def _types(profile: Profile, by_layer: bool) -> dict[tuple[str, str], list[Layer]]:
    out: dict[tuple[str, str], list[Layer]] = {}
    for layer in profile.layers:
        out.setdefault((layer.role, layer.name if by_layer else layer_type(layer.name)), []).append(layer)
    return out


def _row(
    key: tuple[str, str],
    statistic: str,
    proxy: Sequence[Layer],
    target: Sequence[Layer],
    tolerance: float,
    after: float,
) -> Row | None:
    before, now = _mean(_value(statistic), proxy), _mean(_value(statistic), target)
    if math.isnan(now / before):
        return None
    layers = (*proxy, *target)
    predicted = math.nan
    if statistic in LAWS and all(layer.lr * layer.weight_decay > 0 for layer in layers):
        predicted = math.prod(_first_ratio(factor, proxy, target) for factor in LAWS[statistic])
    if math.isnan(predicted):
        verdict = "no prediction"
    elif not all(layer.taus >= after for layer in layers):
        verdict = "too early"
    elif max(off := now / before / predicted, 1 / off) <= tolerance:
        verdict = "as predicted"
    else:
        verdict = "grew" if off > 1 else "shrank"
    return Row(*key, statistic, before, now, predicted, verdict)


def _first_ratio(factor: Sequence[Quantity], proxy: Sequence[Layer], target: Sequence[Layer]) -> float:
    """Target over proxy of the first quantity that is known of both."""
    ratios = (_mean(quantity, target) / _mean(quantity, proxy) for quantity in factor)
    return next((ratio for ratio in ratios if not math.isnan(ratio)), math.nan)


def _mean(quantity: Quantity, layers: Sequence[Layer]) -> float:
    return geometric_mean([quantity(layer) for layer in layers])


def _some(types: Mapping[tuple[str, str], Sequence[Layer]]) -> str:
    names = [layers for _, layers in types]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
