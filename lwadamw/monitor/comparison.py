"""Comparison of a run with its proxy: what grew, what shrank, and whether learning rates and weight decays predict it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..state.names import layer_type
from ..width.steady_state import STEADY_TAUS
from .laws import DEFAULTS, mean_of, predicted_ratio, value_of
from .profile import Profile, SegmentProfile

# At a width ratio of 4, neighbouring rules differ by 4^(1/4) = 1.41 in weight RMS and relative update. The tolerance is
# smaller than that. It is about as large as what small models that still learn are off by at the end of a run (docs/gain.md).
COMPARE_TOLERANCE: Final = 1.25

_Type = tuple[str, str]  # role, and name with layer numbers as `*`; or the whole name, when compared layer by layer


@dataclass(frozen=True)
class Finding:
    """What the comparison found about one statistic of all segments of one type, or of one segment.

    Attributes:
        role: role of the segments.
        layers: name of the segments, with layer numbers as `*`; or the whole name, when compared layer by layer.
        statistic: name of the statistic.
        proxy: geometric mean of the statistic over these segments in the run of the proxy.
        target: geometric mean of the statistic over these segments in the run of the target.
        predicted: what target over proxy should be. NaN if there is no law or no weight decay.
        verdict: "as predicted", "grew", "shrank", "too early" or "no prediction".
    """

    role: str
    layers: str
    statistic: str
    proxy: float
    target: float
    predicted: float
    verdict: str

    @property
    def ratio(self) -> float:
        """Target over proxy."""
        return self.target / self.proxy

    @property
    def off(self) -> float:
        """The ratio over the predicted ratio."""
        return self.ratio / self.predicted


@dataclass(frozen=True)
class Comparison:
    """The findings of `compare`.

    Attributes:
        findings: one finding per statistic and type of segment.
        tolerance: factor by which a ratio may differ from the predicted ratio.
        unmatched: names of the types of segments that only one of the two runs has.
    """

    findings: tuple[Finding, ...]
    tolerance: float
    unmatched: tuple[str, ...]

    @property
    def drifted(self) -> tuple[Finding, ...]:
        """The findings whose ratio differs from the predicted ratio by more than the tolerance."""
        return tuple(finding for finding in self.findings if finding.verdict in ("grew", "shrank"))


def compare(
    proxy: Profile,
    target: Profile,
    tolerance: float = COMPARE_TOLERANCE,
    *,
    statistics: Sequence[str] | None = None,
    by_layer: bool = False,
    after: float = STEADY_TAUS,
) -> Comparison:
    """Compare the statistics of two runs with what their learning rates and weight decays predict.

    The prediction uses the effective eta (lr) and lambda (weight decay) of both runs, whatever their rules are. Where a monitor
    has recorded what it expected, the prediction also includes betas and schedule. d is the fan_in. The statistics are
    proportional to:

        weight_rms                  sqrt(eta / lambda)             Kosson et al. 2510.19093
        relative_update, rotation   sqrt(eta lambda)               Kosson et al. 2305.17212, 2510.19093
        representation_change       sqrt(eta lambda)               if the alignment ratio stays the same
        top, gain                   sqrt(eta / lambda) d^(3/4)     observed by Fan et al. 2510.15262; not universal
        bulk                        sqrt(eta / lambda) (sqrt(rows) + sqrt(columns))     if entries are independent

    Segments are compared by type: layer numbers in their names are replaced by `*`, and each run gets the geometric mean over
    the segments of a type. So the two models may differ in depth. A finding is "too early" if, in either run, some segment of
    the type had been trained for less than `after` tau when its averages began. Segments without weight decay have "no
    prediction".

    Args:
        proxy: profile of the proxy's run.
        target: profile of the target's run.
        tolerance: factor by which a ratio may be larger or smaller than predicted.
        statistics: the statistics to compare. They need not have a law. By default, those of the table above except bulk, if
            both runs have them.
        by_layer: whether to compare segment by segment, those with equal names, instead of by type.
        after: number of tau that must have passed. In one tau, weights forget a factor e of what they were.

    Raises:
        ValueError: the tolerance is not above 1, neither run has some statistic, or the runs have no type of segment in
            common.
    """
    if not tolerance > 1:
        raise ValueError(
            f"compare: tolerance={tolerance} is not above 1. It is a factor. The default is {COMPARE_TOLERANCE}."
        )
    _check_statistics(statistics or (), proxy, target)
    ours, theirs = (_by_type(profile, by_layer) for profile in (proxy, target))
    common = [key for key in ours if key in theirs]
    if not common:
        raise ValueError(
            f"compare: the runs have no layer in common. The proxy has {_some(ours)}, the target {_some(theirs)}. Give the "
            "profiles of two runs whose parameters have the same names, apart from layer numbers."
        )
    findings = [
        finding
        for statistic in statistics or DEFAULTS
        for key in common
        if (finding := _find(key, statistic, ours[key], theirs[key], tolerance, after)) is not None
    ]
    unmatched = [key[1] for key in (*ours, *theirs) if key not in common]
    return Comparison(tuple(findings), tolerance, tuple(dict.fromkeys(unmatched)))


def _check_statistics(statistics: Sequence[str], proxy: Profile, target: Profile) -> None:
    known = {key for profile in (proxy, target) for segment in profile.segments for key in segment.values}
    for statistic in statistics:
        if statistic not in known:
            raise ValueError(f"compare: no run has the statistic {statistic!r}. They have {', '.join(sorted(known))}.")


def _by_type(profile: Profile, by_layer: bool) -> dict[_Type, list[SegmentProfile]]:
    out: dict[_Type, list[SegmentProfile]] = {}
    for segment in profile.segments:
        name = segment.name if by_layer else layer_type(segment.name)
        out.setdefault((segment.role, name), []).append(segment)
    return out


def _find(
    key: _Type,
    statistic: str,
    proxy: Sequence[SegmentProfile],
    target: Sequence[SegmentProfile],
    tolerance: float,
    after: float,
) -> Finding | None:
    """Return the finding about one statistic of one type. None if one of the runs does not have the statistic."""
    before, now = mean_of(value_of(statistic), proxy), mean_of(value_of(statistic), target)
    if math.isnan(now / before):
        return None
    predicted = predicted_ratio(statistic, proxy, target)
    if math.isnan(predicted):
        verdict = "no prediction"
    elif not all(segment.taus >= after for segment in (*proxy, *target)):
        verdict = "too early"
    elif max(off := now / before / predicted, 1 / off) <= tolerance:
        verdict = "as predicted"
    else:
        verdict = "grew" if off > 1 else "shrank"
    return Finding(*key, statistic, before, now, predicted, verdict)


def _some(types: Mapping[_Type, Sequence[SegmentProfile]]) -> str:
    """Return the names of the first three types, for an error message."""
    names = [name for _, name in types]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
