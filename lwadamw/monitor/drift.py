"""A watch that warns as soon as the weights of a run leave what the profile of a proxy predicts."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from typing import Final

from ..state.callers import caller_level
from ..width.steady_state import STEADY_TAUS
from .comparison import Comparison, Finding, compare
from .growth import GROWN, fastest_by_type, growths
from .profile import WINDOW, Profile
from .profile_file import load
from .reading import Reading

# Wider than COMPARE_TOLERANCE, which is for the ends of two runs. While a model still learns, the median of the gains at
# four times the width was off by a factor of up to 1.43 in good runs.
DRIFT_TOLERANCE: Final = 1.5
MOST_NAMED: Final = 3  # at most so many segments are named in a warning
_log = logging.getLogger("lwadamw")
STATISTICS: Final = ("weight_rms", "relative_update", "top", "gain")


class DriftWarning(UserWarning):
    """The weights of a run are not what the profile of its proxy predicts."""


class DriftWatch:
    """Compares every reading with the profile of a proxy and warns once if something grew or shrank.

    Append a watch to `Monitor.on_reading`. At each reading it takes the average over the last tenth of the steps and compares
    it with the proxy at the same step. So both runs should have the same batch size and schedule. After the end of the proxy's
    run it compares with that end.

    A type of layer drifts if, at two readings in a row, one of its statistics differs from the prediction by more than its
    tolerance. The prediction follows from the learning rates and weight decays of both runs (see
    `lwadamw.monitor.comparison.compare`). A type of layer is not judged before `after` tau have passed in all its layers, in
    both runs. The warning is a `DriftWarning`.

    A run also drifts if, at two readings in a row, something differs that the width rule claims to hold equal. Two faults are
    certain, and the watch warns of them at the first reading that shows them: weights that are NaN or infinite, and width
    ratios or a rule that do not fit those of the proxy.

    What has no weight decay, such as heads and embeddings, has no steady state, and no prediction. It grows in good runs too.
    So the watch does not warn of it. It logs one message, at the level WARNING of the logger "lwadamw", at the first reading
    at which such a norm has become twice as large as at the first reading of the watch.

    Args:
        reference: the profile of the proxy, or the path of its file. Or several of them, for instance two seeds: how much they
            differ then calibrates the tolerance.
        tolerance: factor by which the median of a statistic over the types may be larger or smaller than what the rule claims.
            A single type may be off by more: see `compare`. Several proxies can make it larger.
        after: number of tau that must have passed. In one tau, weights forget a factor e of what they were.
        statistics: the statistics to watch. `compare` must have a law for them. A statistic that a run does not have is
            skipped.

    Attributes:
        warned: whether the watch has warned. It does nothing more afterwards. If parameters are split over processes, the
            watches of all of them judge alike, and one gives the warning.

    Raises:
        ValueError: a file is not a profile, there is no reference, or the tolerance is not above 1.

    Examples:
        >>> from lwadamw.monitor.profile import SegmentProfile
        >>> segment = SegmentProfile("w", "matrix", 1.0, lr=1e-3, weight_decay=0.1)
        >>> watch = DriftWatch(Profile((segment,), steps=100))
        >>> watch.warned
        False
    """

    def __init__(
        self,
        reference: Profile | str | os.PathLike[str] | Sequence[Profile | str | os.PathLike[str]],
        tolerance: float = DRIFT_TOLERANCE,
        after: float = STEADY_TAUS,
        statistics: Sequence[str] = STATISTICS,
    ) -> None:
        given = [reference] if isinstance(reference, (Profile, str, os.PathLike)) else list(reference)
        if not given:
            raise ValueError("DriftWatch: there is no reference. Give the profile of a proxy, or the path of its file.")
        self.references = tuple(one if isinstance(one, Profile) else load(one) for one in given)
        if not tolerance > 1:
            raise ValueError(
                f"DriftWatch: tolerance={tolerance} is not above 1. It is a factor. The default is {DRIFT_TOLERANCE}."
            )
        self.tolerance = tolerance
        self.after = after
        self.statistics = tuple(statistics)
        self.warned = False
        self._suspects: set[tuple[str, ...]] = set()
        self._recent: list[Reading] = []
        self._begin: Reading | None = None  # the first reading; None as well when the growth has been told

    def __call__(self, reading: Reading) -> None:
        self._tell_growth(reading)
        if self.warned:
            return
        if broken := _broken(reading):
            self._warn(f"step {reading.step}: weights are NaN or infinite: {broken}", reading.writes)
            return
        self._recent = [r for r in self._recent if r.step > (1 - WINDOW) * reading.step] + [reading]
        try:
            now = Profile.of(self._recent).by_type()
            known = {key for profile in (*self.references, now) for x in profile.segments for key in x.values}
            found = compare(
                [reference.at(reading.step) for reference in self.references],
                now,
                self.tolerance,
                statistics=[name for name in self.statistics if name in known] or None,
                after=self.after,
            )
        except ValueError as error:
            # A watch must never end the run that it watches.
            self._warn(f"nothing is watched: {error}", reading.writes)
            return
        problem = found.claim.sentence if found.claim.certain else self._confirmed(found)
        if problem:
            self._warn(f"step {reading.step}: {problem}", reading.writes)

    def _tell_growth(self, reading: Reading) -> None:
        """Log once what has no weight decay and has grown to GROWN times its norm at the first reading."""
        if not self._recent and not self.warned:
            self._begin = reading
        if self._begin is None or self._begin is reading:
            return
        found = [one for one in growths([self._begin, reading]) if one.grown >= GROWN]
        if not found:
            return
        self._begin = None
        told = [
            f"{one.name} ({one.grown:.3g} times its norm at step {one.since}"
            + ("" if math.isnan(one.top) else f", top singular value {one.top:.3g}")
            + ")"
            for one in fastest_by_type(found).values()
        ]
        if reading.writes:
            _log.warning(
                "lwadamw.DriftWatch, step %d: no weight decay bounds %s. Monitor.report() says how far this goes on.",
                reading.step,
                ", ".join(told[:MOST_NAMED]) + (f" and {len(told) - MOST_NAMED} more" if told[MOST_NAMED:] else ""),
            )

    def _confirmed(self, found: Comparison) -> str:
        """Return what has been wrong at this reading and at the last one, or an empty text."""
        problems: dict[tuple[str, ...], str] = {
            (finding.role, finding.layers, finding.statistic): _told(finding) for finding in found.drifted
        }
        if found.claim.held is False:
            problems["claim",] = found.claim.sentence
        confirmed = [told for key, told in problems.items() if key in self._suspects]
        self._suspects = set(problems)
        listed = "".join(f"\n  {told}" for told in confirmed)
        return f"not what the profile predicts:{listed}" if confirmed else ""

    def _warn(self, message: str, writes: bool) -> None:
        self.warned = True
        if not writes:
            return
        warnings.warn(f"lwadamw.DriftWatch, {message}", DriftWarning, stacklevel=caller_level())


def _broken(reading: Reading) -> str:
    """Return the names of the first segments whose weights are not finite."""
    values = reading.columns.get("weight_rms", ())
    names = [name for name, value in zip(reading.names, values, strict=False) if math.isnan(value)]
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")


def _told(finding: Finding) -> str:
    """Return a finding as one sentence."""
    factor = finding.off if finding.verdict == "grew" else 1 / finding.off
    size = "larger" if finding.verdict == "grew" else "smaller"
    return (
        f"{finding.layers}: {finding.statistic} {finding.verdict} to {finding.target:.3g}, {factor:.2f} times {size} than "
        f"the {finding.proxy * finding.predicted:.3g} predicted from {finding.proxy:.3g}"
    )
