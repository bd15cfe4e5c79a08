"""Norms: what the step measured of every parameter, as the user reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..state.arrays import Array


@dataclass(frozen=True, eq=False)
class Norms:
    """Frobenius norms of the last step, one entry per segment, in the optimizer's order.

    A segment is a parameter, or one part of a parameter that `param_groups(segments=...)` split; its parts are named
    `name[0]`, `name[1]`, ...

    All arrays are float64[len(names)]. A parameter without a gradient in the last step, or any parameter of a step
    that was skipped for a non-finite gradient, has update, grad and angle 0. NaN: not known. Angles smaller than about
    1e-3 update/weight, of updates that hardly do anything but change the length, are not resolved.
    """

    names: tuple[str, ...]
    weight: Array  # after the step
    update: Array  # of weight after minus weight before as kept, weight decay included, lost in rounding not
    grad: Array  # as the update saw it: unscaled and clipped
    angle: Array  # radians between the weight before and after

    @classmethod
    def from_sums(cls, names: Sequence[str], sums: ArrayLike) -> Norms:
        """From `AdamW.norm_sums()`, float64[len(names), 4]; sums of several shards are added before this.

        Raises:
            ValueError: the shape does not match the names.
        """
        table = np.asarray(sums, dtype=np.float64)
        if table.shape != (len(names), 4):
            raise ValueError(
                f"Norms.from_sums: sums have shape {table.shape}, {len(names)} names need ({len(names)}, 4)."
            )
        weight, update, grad, dot = table.T
        # With b the weight before and d the change: |b|^2 from |b + d|^2, and the angle from its sine |b x d|, which
        # keeps its digits for small angles where the cosine has none.
        before = np.maximum(weight - 2 * dot - update, 0.0)
        sine = np.sqrt(np.maximum(before * update - dot**2, 0.0))
        return cls(tuple(names), np.sqrt(weight), np.sqrt(update), np.sqrt(grad), np.arctan2(sine, before + dot))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Flat floats for a logger: `{prefix}{statistic}/{name}`; values that are not known are left out.

        >>> Norms.from_sums(["w"], [[4.0, 0.0, 9.0, 0.0]]).as_dict("norm/")
        {'norm/weight/w': 2.0, 'norm/update/w': 0.0, 'norm/grad/w': 3.0, 'norm/angle/w': 0.0}
        """
        columns = {"weight": self.weight, "update": self.update, "grad": self.grad, "angle": self.angle}
        return {
            f"{prefix}{kind}/{name}": float(value)
            for kind, column in columns.items()
            for name, value in zip(self.names, column, strict=True)
            if not math.isnan(value)
        }
