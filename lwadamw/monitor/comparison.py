"""Comparison of a run with its proxy: what grew, what shrank, and whether learning rates and weight decays predict it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..width.steady_state import STEADY_TAUS
from .calibration import Calibration, Type, Types
from .claims import Claim, judge, width_ratio
from .kinds import types_of
from .laws import DEFAULTS, mean_of, predicted_ratio, value_of
from .profile import Profile, SegmentProfile

# At a width ratio of 4, neighbouring rules differ by 4^(1/4) = 1.41 in weight RMS and relative update. The tolerance is
# smaller than that. It is larger than what the medians of two seeds of small models differ by, which is up to 1.3.
COMPARE_TOLERANCE: Final = 1.35


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
        verdict: "as predicted", "grew", "shrank", "too early", "no prediction" or "not finite".
        tolerance: factor by which the ratio may differ from the predicted ratio.
        settled: what the ratio would be if, in both runs, the weights had followed their learning rates. With a schedule, the
            run with the larger tau lags behind. NaN without a prediction.
    """

    role: str
    layers: str
    statistic: str
    proxy: float
    target: float
    predicted: float
    verdict: str
    tolerance: float = COMPARE_TOLERANCE
    settled: float = math.nan

    @property
    def ratio(self) -> float:
        """Target over proxy. It is infinite if only the proxy is 0."""
        return self.target / self.proxy if self.proxy else math.inf

    @property
    def off(self) -> float:
        """The ratio over the predicted ratio."""
        return self.ratio / self.predicted


@dataclass(frozen=True)
class Comparison:
    """The findings of `compare`.

    Attributes:
        findings: one finding per statistic and type of segment.
        tolerance: factor by which the median of the ratios may differ from the predicted ratio.
        unmatched: names of the types of segments that only one of the two runs has.
        claim: whether what the rule claims to hold was held.
        calibration: the tolerances in words.
    """

    findings: tuple[Finding, ...]
    tolerance: float
    unmatched: tuple[str, ...]
    claim: Claim
    calibration: str

    @property
    def drifted(self) -> tuple[Finding, ...]:
        """The findings whose ratio differs from the predicted ratio by more than their tolerance."""
        return tuple(finding for finding in self.findings if finding.verdict in ("grew", "shrank"))

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The types of segments with weights that are NaN or infinite in one of the runs."""
        return tuple(finding for finding in self.findings if finding.verdict == "not finite")

    @property
    def failed(self) -> bool:
        """Whether some weights are not finite, something drifted, or the rule did not hold what it claims to hold."""
        return bool(self.broken or self.drifted or self.claim.held is False)


def compare(
    proxy: Profile | Sequence[Profile],
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
    the type had been trained for less than `after` tau when its averages began. Segments have "no prediction" without weight
    decay, and where the optimizer has no steady state that is known (amsgrad, huber decay). A type with weights that are NaN
    or infinite is "not finite".

    A single type may be off by more than `tolerance`, because it also follows what it learns; the median over all types, which
    decides about the claim of a rule, may not. `lwadamw.monitor.calibration.Calibration` has the factors. Several proxies
    calibrate them. The target is then compared with the geometric mean of the proxies.

    Args:
        proxy: profile of the proxy's run; or profiles of several proxies, for instance two seeds.
        target: profile of the target's run.
        tolerance: factor by which the median of the ratios may be larger or smaller than predicted. Several proxies can make
            it larger.
        statistics: the statistics to compare. They need not have a law. By default, those of the table above except bulk, if
            both runs have them.
        by_layer: whether to compare segment by segment, those with equal names, instead of by type.
        after: number of tau that must have passed. In one tau, weights forget a factor e of what they were.

    Raises:
        ValueError: there is no proxy, the tolerance is not above 1, no run has some statistic, or the runs have no type of
            segment in common.
    """
    if not tolerance > 1:
        raise ValueError(
            f"compare: tolerance={tolerance} is not above 1. It is a factor. The default is {COMPARE_TOLERANCE}."
        )
    proxies = (proxy,) if isinstance(proxy, Profile) else tuple(proxy)
    if not proxies:
        raise ValueError("compare: there is no proxy. Give at least one profile.")
    _check_statistics(statistics or (), *proxies, target)
    each = [_by_type(profile, by_layer) for profile in proxies]
    theirs = _by_type(target, by_layer)
    # A geometric mean over the segments of all proxies is the mean of the proxies.
    ours = {key: [x for one in each for x in one[key]] for key in each[0] if all(key in one for one in each)}
    common = [key for key in ours if key in theirs]
    if not common:
        raise ValueError(
            f"compare: the runs have no layer in common. The proxy has {_some(ours)}, the target {_some(theirs)}. Give the "
            "profiles of two runs whose parameters have the same names, apart from layer numbers."
        )
    grown = width_ratio(ours, theirs)
    octaves = abs(math.log2(grown)) if grown > 0 else 0.0
    calibration = Calibration(each, statistics or DEFAULTS, tolerance, after, octaves)
    everywhere = dict.fromkeys(key for types in (*each, theirs) for key in types)
    findings = [
        _broken(key, ours.get(key, ()), theirs.get(key, ()))
        for key in everywhere
        if not all(x.finite for types in (*each, theirs) for x in types.get(key, ()))
    ]
    findings += [
        finding
        for statistic in statistics or DEFAULTS
        for key in common
        if (finding := _find(key, statistic, ours[key], theirs[key], calibration.tolerance(key, statistic), after))
    ]
    unmatched = [key[1] for key in everywhere if key not in common]
    claim = judge(proxies, target, ours, theirs, findings, calibration)
    return Comparison(tuple(findings), tolerance, tuple(dict.fromkeys(unmatched)), claim, str(calibration))


def _check_statistics(statistics: Sequence[str], *profiles: Profile) -> None:
    known = {key for profile in profiles for segment in profile.segments for key in segment.values}
    for statistic in statistics:
        if statistic not in known:
            raise ValueError(f"compare: no run has the statistic {statistic!r}. They have {', '.join(sorted(known))}.")


def _by_type(profile: Profile, by_layer: bool) -> dict[Type, list[SegmentProfile]]:
    out: dict[Type, list[SegmentProfile]] = {}
    names = [segment.name for segment in profile.segments]
    for segment, name in zip(profile.segments, names if by_layer else types_of(names), strict=True):
        out.setdefault((segment.role, name), []).append(segment)
    return out


def _broken(key: Type, proxy: Sequence[SegmentProfile], target: Sequence[SegmentProfile]) -> Finding:
    """Return the finding about a type with weights that are not finite."""
    before, now = (mean_of(value_of("weight_rms"), segments) for segments in (proxy, target))
    return Finding(*key, "weight_rms", before, now, math.nan, "not finite")


def _find(
    key: Type,
    statistic: str,
    proxy: Sequence[SegmentProfile],
    target: Sequence[SegmentProfile],
    tolerance: float,
    after: float,
) -> Finding | None:
    """Return the finding about one statistic of one type. None if one of the runs does not have the statistic."""
    before, now = mean_of(value_of(statistic), proxy), mean_of(value_of(statistic), target)
    if math.isnan(now) or math.isnan(before) or now == before == 0:
        return None
    predicted = predicted_ratio(statistic, proxy, target)
    if not predicted > 0 or any(math.isnan(segment.taus) for segment in (*proxy, *target)):
        verdict = "no prediction"
    elif not all(segment.taus >= after for segment in (*proxy, *target)):
        verdict = "too early"
    elif before * predicted <= tolerance * now and now <= tolerance * before * predicted:
        verdict = "as predicted"
    else:
        verdict = "grew" if now > before * predicted else "shrank"
    steady = predicted_ratio(statistic, proxy, target, settled=True)
    settled = now / (before * predicted) * steady if before * predicted > 0 else math.nan
    return Finding(*key, statistic, before, now, predicted, verdict, tolerance, settled)


def _some(types: Types) -> str:
    """Return the names of the first three types, for an error message."""
    names = [name for _, name in types]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
