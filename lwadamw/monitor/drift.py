"""A watch that warns as soon as the weights of a run leave what the profile of a proxy predicts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Final

from ..width.steady_state import STEADY_TAUS
from .comparison import Finding, compare
from .profile import WINDOW, Profile
from .profile_file import load
from .reading import Reading

# This is wider than COMPARE_TOLERANCE = 1.25, which is for the ends of two runs. While a model still learns, top singular
# values at four times the width were off by a factor of up to 1.4 (docs/gain.md).
DRIFT_TOLERANCE: Final = 1.5
STATISTICS: Final = ("weight_rms", "relative_update", "top", "gain")


class DriftWarning(UserWarning):
    """The weights of a run are not what the profile of its proxy predicts."""


class DriftWatch:
    """Compares every reading with the profile of a proxy and warns once if something grew or shrank.

    Append a watch to `Monitor.on_reading`. At each reading it takes the average over the last tenth of the steps and compares
    it with the proxy at the same step. So both runs should have the same batch size and schedule. After the end of the proxy's
    run it compares with that end.

    A type of layer drifts if, at two readings in a row, one of its statistics differs from the prediction by more than the
    tolerance. The prediction follows from the learning rates and weight decays of both runs (see
    `lwadamw.monitor.comparison.compare`). A type of layer is not judged before `after` tau have passed in all its layers, in
    both runs. The warning is a `DriftWarning`.

    Args:
        reference: the profile of the proxy, or the path of its file.
        tolerance: factor by which a statistic may be larger or smaller than predicted.
        after: number of tau that must have passed. In one tau, weights forget a factor e of what they were.
        statistics: the statistics to watch. `compare` must have a law for them. A statistic that a run does not have is
            skipped.

    Attributes:
        warned: whether the watch has warned. It does nothing more afterwards. If parameters are split over processes, the
            watches of all of them judge alike, and one gives the warning.

    Raises:
        ValueError: the file is not a profile, or the tolerance is not above 1.

    Examples:
        >>> from lwadamw.monitor.profile import SegmentProfile
        >>> segment = SegmentProfile("w", "matrix", 1.0, lr=1e-3, weight_decay=0.1)
        >>> watch = DriftWatch(Profile((segment,), steps=100))
        >>> watch.warned
        False
    """

    def __init__(
        self,
        reference: Profile | str | os.PathLike[str],
        tolerance: float = DRIFT_TOLERANCE,
        after: float = STEADY_TAUS,
        statistics: Sequence[str] = STATISTICS,
    ) -> None:
        self.reference = reference if isinstance(reference, Profile) else load(reference)
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

    def __call__(self, reading: Reading) -> None:
        if self.warned:
            return
        self._recent = [r for r in self._recent if r.step > (1 - WINDOW) * reading.step] + [reading]
        try:
            now = Profile.of(self._recent).by_type()
            found = compare(self.reference.at(reading.step), now, self.tolerance, after=self.after)
            watched = [finding for finding in found.drifted if finding.statistic in self.statistics]
        except ValueError as error:
            # A watch must never end the run that it watches.
            self._warn(f"nothing is watched: {error}", reading.writes)
            return
        drifted = {(finding.role, finding.layers, finding.statistic): finding for finding in watched}
        confirmed = [finding for key, finding in drifted.items() if key in self._suspects]
        self._suspects = set(drifted)
        if confirmed:
            listed = "".join(f"\n  {_told(finding)}" for finding in confirmed)
            self._warn(
                f"step {reading.step}: not what the profile predicts, by more than {self.tolerance:g}:{listed}",
                reading.writes,
            )

    def _warn(self, message: str, writes: bool) -> None:
        self.warned = True
        if not writes:
            return
        warnings.warn(f"lwadamw.DriftWatch, {message}", DriftWarning, stacklevel=3)


def _told(finding: Finding) -> str:
    """Return a finding as one sentence."""
    factor = finding.off if finding.verdict == "grew" else 1 / finding.off
    size = "larger" if finding.verdict == "grew" else "smaller"
    return (
        f"{finding.layers}: {finding.statistic} {finding.verdict} to {finding.target:.3g}, {factor:.2f} times {size} than "
        f"the {finding.proxy * finding.predicted:.3g} predicted from {finding.proxy:.3g}"
    )
