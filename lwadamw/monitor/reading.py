"""A reading: what a monitor saw of every segment at one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..state.arrays import Array
from ..step.norms import Norms


@dataclass(frozen=True, eq=False)
class Reading:
    """What a monitor saw at one step. All arrays are float64[len(names)], with NaN where there is no value.

    Attributes:
        step: the number of steps that the optimizer had taken.
        names: names of the segments, in the order of `Norms.names`.
        roles: role of every segment.
        m: width ratio of every segment.
        lr: effective learning rate of every segment.
        weight_decay: effective weight decay of every segment.
        columns: statistic -> its value for every segment. `lwadamw.Monitor` describes the statistics.
        writes: whether this process is the one to log the reading. Where parameters are split over processes, all of them have
            the same reading.
        shapes: shape of the whole parameter, by name, of parameters that are held in pieces whose place is known.
        fan_in: fan_in of every segment. Empty if it is not known of any.
        rule: name of the optimizer's rule.
        unbounded: names of the segments with two or more dimensions and without weight decay: nothing bounds their norms.
        norms: the norms of the step, in the order of `names`. None if they are not known.
    """

    step: int
    names: tuple[str, ...]
    roles: tuple[str, ...]
    m: Array
    lr: Array
    weight_decay: Array
    columns: Mapping[str, Array] = field(default_factory=dict)
    writes: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fan_in: Array = field(default_factory=lambda: np.empty(0))
    rule: str = "none"
    unbounded: tuple[str, ...] = ()
    norms: Norms | None = None
