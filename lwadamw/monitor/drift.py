"""A run that warns as soon as its weights leave what a proxy's profile predicts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Final

from ..width.steady_state import STEADY_TAUS
from .comparison import Row, compare
from .profile import WINDOW, Profile, load
from .reading import Reading

# Wider than between the ends of two runs, which are 1.25 apart: while a model learns, top singular values at four times the
# width were up to 1.4 off (docs/gain.md).
TOLERANCE: Final = 1.5
STATISTICS: Final = ("weight_rms", "relative_update", "top", "gain")


class DriftWarning(UserWarning):
    """Weights of a run are not what the profile of its proxy predicts."""


class DriftWatch:
    """Compares every reading with a proxy's profile, and warns once, a `DriftWarning`, of what grew or shrank.

    Add it to `Monitor.on_reading`. What the weights have been over the last tenth of the steps is compared with what the
    proxy's were at the same step, so both runs should have the same batch and schedule; after the proxy's end, with its end. A
    type of layers drifts where a statistic is off by more than the tolerance at two readings in a row, against what learning
    rates and decays predict (`lwadamw.monitor.compare`); never before `after` tau have passed in all its layers, in both
    runs.

    Args:
        reference: the proxy's profile, or its file.
        tolerance: factor by which a statistic may be off, either way.
        after: tau that must have passed, in which weights forget a factor e of what they were.
        statistics: which are watched, of those that `compare` has a law for; what a run does not have is passed over.

    Raises:
        ValueError: the file is no profile, or the tolerance is not above 1.

    Example:
        >>> from lwadamw.monitor.profile import Layer
        >>> watch = DriftWatch(Profile((Layer("w", "matrix", 1.0, lr=1e-3, weight_decay=0.1),), steps=100))
        >>> watch.warned
        False
    """

    def __init__(
        self,
        reference: Profile | str | os.PathLike[str],
        tolerance: float = TOLERANCE,
        after: float = STEADY_TAUS,
        statistics: Sequence[str] = STATISTICS,
    ) -> None:
        self.reference = reference if isinstance(reference, Profile) else load(reference)
        if not tolerance > 1:
            raise ValueError(
                f"DriftWatch: tolerance={tolerance} is not above 1. It is a factor, {TOLERANCE} by default."
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
            rows = [row for row in found.drifted if row.statistic in self.statistics]
        except ValueError as error:
            # Nothing that is watched may end the run it watches.
            self._warn(f"nothing is watched: {error}")
            return
        drifted = {(row.role, row.layers, row.statistic): row for row in rows}
        confirmed = [row for key, row in drifted.items() if key in self._suspects]
        self._suspects = set(drifted)
        if confirmed:
            listed = "".join(f"\n  {_told(row)}" for row in confirmed)
            self._warn(f"step {reading.step}: not what the profile predicts, by more than {self.tolerance:g}:{listed}")

    def _warn(self, message: str) -> None:
        self.warned = True
        warnings.warn(f"lwadamw.DriftWatch, {message}", DriftWarning, stacklevel=3)


def _told(row: Row) -> str:
    factor = row.off if row.verdict == "grew" else 1 / row.off
    size = "larger" if row.verdict == "grew" else "smaller"
    return (
        f"{row.layers}: {row.statistic} {row.verdict} to {row.target:.3g}, {factor:.2f} times {size} than the "
        f"{row.proxy * row.predicted:.3g} predicted from {row.proxy:.3g}"
    )
