"""Reading: what a monitor saw of every matrix and vector at one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..state.arrays import Array


@dataclass(frozen=True, eq=False)
class Reading:
    """Statistics at one step, one entry per segment of the optimizer, in the order of `Norms.names`.

    Arrays are float64[len(names)], NaN where a value is not known or means nothing.
    """

    step: int
    names: tuple[str, ...]
    roles: tuple[str, ...]
    m: Array  # width ratio
    lr: Array  # effective
    weight_decay: Array
    columns: Mapping[str, Array] = field(default_factory=dict)  # statistic -> its values
