"""Profiles: what the weights of a run settled to, so that a run at another width can be compared with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ..state.arrays import Array
from ..width.steady_state import STEADY_TAUS
from .kinds import types_of
from .reading import Reading

WINDOW: Final = 0.1  # a profile is the average of the readings in this last part of the steps
_NOT_AVERAGED: Final = ("taus", "calibrated_at", "top_of")  # columns that say when or where something happened


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean. It is NaN if some value is negative or not finite, and otherwise 0 if some value is 0.

    Of no values it is NaN.
    """
    if not values or not all(value >= 0 and math.isfinite(value) for value in values):
        return math.nan
    if not all(values):
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class SegmentProfile:
    """One segment of a run, averaged over the profile's window. It can also stand for all segments of one type.

    Attributes:
        name: name of the segment. For a type, layer numbers are `*`.
        role: role of the parameter.
        m: width ratio. NaN where the rule does not use it.
        lr: effective learning rate, mean over the window.
        weight_decay: effective weight decay, mean over the window.
        taus: sum of lr * weight_decay from the first reading to the begin of the window.
        shape: shape of the segment. Empty if it is not known.
        fan_in: fan_in of the matrix. None if it is not known.
        values: statistic -> mean over the window. NaN where it is not known. A `weight_rms` that is NaN means that some
            weight was not finite at the end of the window.
    """

    name: str
    role: str
    m: float
    lr: float
    weight_decay: float
    taus: float = math.nan
    shape: tuple[int, ...] = ()
    fan_in: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether all weights were finite."""
        return not math.isnan(self.values.get("weight_rms", 0.0))

    @property
    def verdict(self) -> str:
        """Whether the window can be compared with a steady state: "steady", "too early", "no decay" or "not finite"."""
        if not self.finite:
            return "not finite"
        if not self.lr * self.weight_decay > 0:
            return "no decay"
        return "steady" if self.taus >= STEADY_TAUS else "too early"


@dataclass(frozen=True)
class Profile:
    """What the weights of a run settled to.

    Attributes:
        segments: the segments of the run.
        steps: the step of the last reading.
        rule: name of the rule. Several names are joined with commas.
        base: base values lr and weight_decay, and betas, as they were when the profile was saved.
        window: the steps of the first and of the last reading that were averaged.
        meta: anything else that the user kept.
        package: version of lwadamw that wrote the profile.
        history: profiles of the run up to earlier readings, oldest first. They have one segment per type.
    """

    segments: tuple[SegmentProfile, ...]
    steps: int
    rule: str = "none"
    base: Mapping[str, Any] = field(default_factory=dict)
    window: tuple[int, int] = (0, 0)
    meta: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""
    history: tuple[Profile, ...] = ()

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Profile:
        """Make a profile from readings alone. The shapes of its segments are not known.

        Args:
            readings: at least one reading, oldest first. The profile is the mean of those in the last tenth of the steps.
        """
        last = readings[-1]
        window = [r for r in readings if r.step > (1 - WINDOW) * last.step]
        statistics = dict.fromkeys(key for r in window for key in r.columns if key not in _NOT_AVERAGED)
        names = last.names
        lr = _mean([(r.names, r.lr) for r in window], names)
        weight_decay = _mean([(r.names, r.weight_decay) for r in window], names)
        taus = _mean([(r.names, r.columns["taus"]) for r in window[:1] if "taus" in r.columns], names)
        values = {
            key: _mean([(r.names, r.columns[key]) for r in window if key in r.columns], names) for key in statistics
        }
        if "weight_rms" in last.columns:
            # Earlier readings of the window may have been finite. Their mean must not hide that the run is broken.
            values["weight_rms"] = np.where(np.isnan(last.columns["weight_rms"]), np.nan, values["weight_rms"])
        fan_in = [None if math.isnan(value) else int(value) for value in last.fan_in] or [None] * len(names)
        segments = (
            SegmentProfile(
                name,
                last.roles[i],
                float(last.m[i]),
                float(lr[i]),
                float(weight_decay[i]),
                float(taus[i]),
                fan_in=fan_in[i],
                values={key: float(column[i]) for key, column in values.items()},
            )
            for i, name in enumerate(names)
        )
        return cls(tuple(segments), last.step, last.rule, window=(window[0].step, last.step))

    def by_type(self) -> Profile:
        """Return the profile with one segment for all segments of a type.

        Its numbers are geometric means. Its taus are those of the segment with the fewest. The result has no history.
        """
        types: dict[tuple[str, str], list[SegmentProfile]] = {}
        for segment, kind in zip(self.segments, types_of([x.name for x in self.segments]), strict=True):
            types.setdefault((segment.role, kind), []).append(segment)
        segments = (
            SegmentProfile(
                name,
                role,
                geometric_mean([x.m for x in some]),
                geometric_mean([x.lr for x in some]),
                geometric_mean([x.weight_decay for x in some]),
                taus=min((x.taus for x in some), key=lambda taus: -math.inf if math.isnan(taus) else taus),
                fan_in=_mean_fan_in([x.fan_in for x in some]),
                values={key: geometric_mean([x.values[key] for x in some]) for key in some[0].values},
            )
            for (role, name), some in types.items()
        )
        return replace(self, segments=tuple(segments), history=())

    def at(self, step: int) -> Profile:
        """Return what the run was at a step.

        Args:
            step: number of steps taken.

        Returns:
            The latest profile in the history that is not later than `step`, or the first one in the history if all are later.
            The profile itself if it has no history or if the run had ended at `step`. Rule and base values are those of the
            run, and so is the fan_in where the history does not have it.
        """
        if step >= self.steps or not self.history:
            return self
        past = next((past for past in reversed(self.history) if past.steps <= step), self.history[0])
        known = {(x.role, x.name): x.fan_in for x in self.by_type().segments}
        segments = (replace(x, fan_in=known.get((x.role, x.name))) if x.fan_in is None else x for x in past.segments)
        return replace(past, segments=tuple(segments), rule=self.rule, base=self.base)


def _mean_fan_in(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean of some fan_ins, and None if one of them is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return known[0] if len(set(known)) == 1 else geometric_mean(known)


def _mean(columns: Sequence[tuple[tuple[str, ...], Array]], names: tuple[str, ...]) -> Array:
    """Return the mean of columns over the values that are known, float64[len(names)].

    Each column comes with the names of its own segments, because segments can be added or removed during a run.
    """
    rows = []
    for own, values in columns:
        place = dict(zip(own, values, strict=True))
        rows.append(values if own == names else [place.get(name, math.nan) for name in names])
    table = np.asarray(rows, dtype=np.float64).reshape(-1, len(names))
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, table, 0.0).sum(axis=0) / known.sum(axis=0)
    return mean
