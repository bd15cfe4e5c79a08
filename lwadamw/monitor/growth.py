"""Growth of what has no weight decay: how much larger it has become, and how large it becomes if the learning rate stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from .kinds import types_of
from .reading import Reading

GROWN: Final = 2.0  # a norm that has become so many times as large is worth a message


class Growth(NamedTuple):
    """How a weight without weight decay has grown, and what it grows by if the learning rate stays as it is.

    Attributes:
        name: name of the segment.
        rms: its weight_rms at the latest reading.
        top: its top singular value. NaN if it is not known.
        since: the step of the first reading that is compared.
        grown: weight_rms over that at `since`.
        until: the step of the forecast.
        noise: weight_rms at `until` over that of now, if updates are noise.
        aligned: the same if all updates point the same way.
        top_aligned: the top singular value at `until` over that of now, if all updates point the same way.
    """

    name: str
    rms: float
    top: float
    since: int
    grown: float
    until: int
    noise: float
    aligned: float
    top_aligned: float


def growths(readings: Sequence[Reading], steps: int | None = None) -> list[Growth]:
    """Return how everything has grown that has two or more dimensions and no weight decay at the latest reading.

    Let D be what all updates so far have added to the weight. An update is as large as the learning rate. If updates are noise,
    |D|^2 grows by lr^2 per step. If they all point the same way, |D| and the top singular value of D grow by lr per step. The
    initial weight is taken to be orthogonal to D, so |w|^2 = |w_0|^2 + |D|^2. Both forecasts go on from the growth that was
    seen, and the latest lr counts for all steps to come. So a schedule that falls from now on makes less of it.

    Args:
        readings: readings of a monitor, oldest first.
        steps: length of the run in steps. The forecast is for its end, or for twice the present number of steps if the
            length is not known or the run is over.
    """
    if not readings:
        return []
    last = readings[-1]
    until = steps if steps is not None and steps > last.step else 2 * last.step
    return [_growth(readings, name, until) for name in last.unbounded]


def _growth(readings: Sequence[Reading], name: str, until: int) -> Growth:
    seen = [(r, r.names.index(name)) for r in readings if name in r.names and "weight_rms" in r.columns]
    step, rms, lr = np.array([(r.step, r.columns["weight_rms"][i], r.lr[i]) for r, i in seen], dtype=np.float64).T
    last, index = seen[-1]
    left, more = until - last.step, max(float(rms[-1] ** 2 - rms[0] ** 2), 0.0)
    # The steps before the first reading have the learning rate of that reading, because no other one is known.
    before, passed = float(lr[0] * step[0]), float(np.sum(lr[1:] * np.diff(step)))
    now, end = before + passed, before + passed + float(lr[-1]) * left
    squares = float(np.sum(lr[1:] ** 2 * np.diff(step)))
    noise = aligned = top_aligned = math.nan
    if passed > 0 and rms[-1] > 0:
        square = float(rms[-1] ** 2)
        noise = math.sqrt(1 + more / square * float(lr[-1]) ** 2 * left / squares)
        aligned = math.sqrt(1 + more / square * (end**2 - now**2) / (now**2 - before**2))
        top_aligned = end / now
    top = float(last.columns["top"][index]) if "top" in last.columns else math.nan
    grown = float(rms[-1] / rms[0]) if rms[0] > 0 else math.nan
    return Growth(name, float(rms[-1]), top, int(step[0]), grown, until, noise, aligned, top_aligned)


def fastest_by_type(found: Sequence[Growth]) -> dict[str, Growth]:
    """Return, for each type of layer, the one that has grown most. A growth that is not known counts as the smallest.

    Args:
        found: what `growths` returned.
    """
    out: dict[str, Growth] = {}
    for one, kind in zip(found, types_of([one.name for one in found]), strict=True):
        known = out.setdefault(kind, one)
        if not known.grown >= one.grown and not math.isnan(one.grown):
            out[kind] = one
    return out
