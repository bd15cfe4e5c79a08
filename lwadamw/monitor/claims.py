"""What a width rule claims to hold equal at every width, and whether two runs held it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Final

from .calibration import Calibration, Types
from .laws import mean_of
from .profile import Profile, SegmentProfile

if TYPE_CHECKING:
    from .comparison import Finding

# muP holds the change of the activations, under its assumption about alignment. Only a probe measures this change.
CLAIMED: Final[Mapping[str, tuple[str, ...]]] = {
    "mup": ("representation_change",),
    "fan2025": ("top", "gain"),
    "kosson2025": ("relative_update", "rotation"),
    "balanced": ("relative_update", "rotation", "top", "gain"),
    "completep": ("relative_update", "rotation"),
}
UNSCALED: Final = ("top", "gain")  # what grows with the width where nothing is scaled
MOST_NAMED: Final = 3
MOST_EXPLAINED: Final = 1.1  # values that predict a larger factor than this are not those of a rule that claims 1
SAME: Final = 0.01  # values that differ by less than this share count as equal


@dataclass(frozen=True)
class Claim:
    """Whether what a rule claims to hold equal was equal in two runs.

    Attributes:
        held: True, False, or None if this is not known.
        sentence: one line that says so, for which types of layers, and why.
        certain: whether `held` is False for a reason that no measurement can change, for instance a wrong width ratio.
    """

    held: bool | None
    sentence: str
    certain: bool = False


def judge(
    proxies: Sequence[Profile],
    target: Profile,
    ours: Types,
    theirs: Types,
    findings: Sequence[Finding],
    calibration: Calibration,
) -> Claim:
    """Judge what the rule of a run claims.

    The rule is that of the target. If the target has none, or "standard", the rule is that of the proxies, because then the
    question is whether the target follows it. Only matrices count: rules make no claim about embeddings and heads.

    A wrong rule moves all kinds of matrices by about the same factor. What a kind learns moves it alone. So the median over the
    kinds decides; a single kind counts if it is further off than what learning explains.

    Args:
        proxies: the profiles of the proxies.
        target: the profile of the target.
        ours: the segments of all proxies by type.
        theirs: the segments of the target by type.
        findings: what the comparison found, with `predicted` and `tolerance`.
        calibration: the tolerances.
    """
    base = proxies[0]
    rule = next((name for name in (target.rule, base.rule) if name in CLAIMED), "")
    grown = width_ratio(ours, theirs)
    if not rule:
        if "standard" not in (target.rule, base.rule):
            return Claim(None, f"not known whether the rule held: nothing is known of the claims of {target.rule!r}")
        if abs(grown - 1) < SAME or math.isnan(grown):
            return Claim(None, "nothing to hold: standard does not scale with the width, and the width is the same")
    claims = CLAIMED.get(rule, UNSCALED)
    said = f"{rule} claims that {_listed(claims)} stay{'s' * (len(claims) == 1)} equal"
    if not rule:
        said = f"standard claims nothing, and {_listed(claims)} should stay equal"
    why, certain = _reason(rule, proxies, target, ours, theirs)
    rows = [f for f in findings if f.role == "matrix" and f.statistic in claims and not math.isnan(f.settled)]
    judged = [f for f in rows if f.verdict != "too early"]
    apart = [f for f in judged if not _within(f.settled, f.tolerance)]
    for statistic in claims:
        some = [f for f in judged if f.statistic == statistic]
        limit = calibration.of_median(statistic)
        if some and not _within(middle := median(f.settled for f in some), limit):
            side = [f for f in some if (f.settled > 1) == (middle > 1) and not _within(f.settled, limit)]
            apart += [f for f in side if f not in apart]
    if apart:
        why = why or _cause(apart)
        return Claim(False, f"not held: {said}, but {_told(apart, judged)}: {why}", certain)
    if certain:
        return Claim(False, f"not held: {said}: {why}", True)
    if other := _other_base(base, target):
        return Claim(None, f"not known: {said} for equal base values, and {other}")
    if not judged:
        reason = "it is too early" if rows else f"the profiles have no {_listed(claims)} of matrices with weight decay"
        return Claim(None, f"not known: {said}, but {reason}")
    kinds = len({f.layers for f in judged})
    span = f"x{min(f.settled for f in judged):.2f} to x{max(f.settled for f in judged):.2f}"
    span = f"median x{median(f.settled for f in judged):.2f}, {span}"
    measured = _listed(dict.fromkeys(f.statistic for f in judged))
    skipped = len({f.layers for f in rows}) - kinds
    late = f"; for {skipped} it is too early" if skipped else ""
    return Claim(True, f"held: {said}; {measured} did in {_kinds(kinds)} ({span}){late}")


def _within(factor: float, tolerance: float) -> bool:
    return 1 / tolerance <= factor <= tolerance


def width_ratio(ours: Types, theirs: Types) -> float:
    """Return the median over types of matrices of the fan_in of the target over that of the proxies. NaN if not known."""
    ratios = [_ratio(_fan_in, ours[key], theirs[key]) for key in ours if key in theirs and key[0] == "matrix"]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return median(known) if known else math.nan


def wrong_widths(ours: Types, theirs: Types) -> tuple[float, float] | None:
    """Return by how much m and the fan_in have grown, of the first type of matrix of which they grew differently."""
    for key in ours:
        if key in theirs and key[0] == "matrix":
            m, fan_in = _ratio(lambda x: x.m, ours[key], theirs[key]), _ratio(_fan_in, ours[key], theirs[key])
            if abs(m / fan_in - 1) > SAME:
                return m, fan_in
    return None


def _reason(rule: str, proxies: Sequence[Profile], target: Profile, ours: Types, theirs: Types) -> tuple[str, bool]:
    """Return why the claim cannot hold, apart from any measurement, and whether that is certain."""
    grown = width_ratio(ours, theirs)
    if (wrong := wrong_widths(ours, theirs)) is not None:
        m, fan_in = wrong
        return f"the fan_in grew by {fan_in:.3g}, but the rule scaled by m = {m:.3g}. Check base_width", True
    if rule and target.rule != rule and abs(grown - 1) > SAME:
        ran = "without a rule" if target.rule == "none" else f"under {target.rule}"
        return f"the target ran {ran}, and its fan_in is {grown:.3g} times as large", True
    if lost := [name for (role, name), some in theirs.items() if _lost_decay(role, ours.get((role, name), ()), some)]:
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        return f"the target has no weight decay in {', '.join(lost[:MOST_NAMED])}{more}, and the proxy has", True
    if not rule:
        return f"nothing was scaled, and the fan_in grew by {grown:.3g}", False
    return "", False


def _lost_decay(role: str, ours: Sequence[SegmentProfile], theirs: Sequence[SegmentProfile]) -> bool:
    """Return whether a kind of matrix has weight decay in the proxies, and none in the target."""
    return role == "matrix" and any(x.weight_decay > 0 for x in ours) and not any(x.weight_decay for x in theirs)


def _cause(apart: Sequence[Finding]) -> str:
    """Return whether the values of the run or the weights are to blame."""
    predicted = [f.settled / f.off for f in apart if f.off > 0]
    predicted = [x for x in predicted if abs(math.log(x)) > math.log(MOST_EXPLAINED)]
    if 2 * len(predicted) > len(apart):
        middle = median(predicted)
        return f"learning rates and weight decays predict x{middle:.2f}, so the values are not those of the rule"
    return "learning rates and weight decays are those of the rule, and the weights did not follow them"


def _other_base(proxy: Profile, target: Profile) -> str:
    for key in ("lr", "weight_decay"):
        a, b = proxy.base.get(key), target.base.get(key)
        if a and b and abs(b / a - 1) > SAME:
            return f"the base {key} is {a:g} and {b:g}"
    return ""


def _told(apart: Sequence[Finding], judged: Sequence[Finding]) -> str:
    parts = []
    for statistic in dict.fromkeys(f.statistic for f in apart):
        some = [f for f in apart if f.statistic == statistic]
        of = sum(f.statistic == statistic for f in judged)
        ratios = sorted(f.settled for f in some)
        span = f"x{ratios[0]:.2f}" + (f" to x{ratios[-1]:.2f}" if len(some) > 1 else "")
        names = [f.layers for f in sorted(some, key=lambda f: -abs(math.log(f.settled or 1e-300)))]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        parts.append(
            f"{statistic} changed by {span} in {len(some)} of {_kinds(of)} ({', '.join(names[:MOST_NAMED])}{more})"
        )
    return "; ".join(parts)


def _kinds(count: int) -> str:
    return f"{count} kind{'s' * (count != 1)} of matrices"


def _listed(names: Sequence[str] | Mapping[str, None]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _fan_in(segment: SegmentProfile) -> float:
    return math.nan if segment.fan_in is None else float(segment.fan_in)


def _ratio(
    quantity: Callable[[SegmentProfile], float], ours: Sequence[SegmentProfile], theirs: Sequence[SegmentProfile]
) -> float:
    return mean_of(quantity, theirs) / mean_of(quantity, ours)
