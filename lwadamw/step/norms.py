"""Norms: what a step measured of every segment, in the form that the user reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..state.arrays import Array


@dataclass(frozen=True, eq=False)
class Norms:
    """Frobenius norms of the last step: one entry per segment, in the order of the optimizer's parameters.

    A segment is a whole parameter, or one part of a parameter that `param_groups(segments=...)` has split. The parts of
    the parameter `name` are called `name[0]`, `name[1]`, ...

    A parameter that had no gradient in the last step has update, grad and angle 0. So has every parameter if the last
    step was skipped because of a non-finite gradient. NaN means that a value is not known. On the Triton backend, the weight
    of such a parameter counts as its own last step left it: what others have written since is not seen.

    The kernels add squares in float32. So a norm above 1.8e19 may be shown as inf, and elements below 1e-19 may be left out.
    `grad` is the norm of the gradient that the moments took, whose elements are at most 1.8e19, see docs/storage.md.

    The angle has a limit of resolution. If the update hardly does more than change the length of the weight, angles
    below about 1e-3 update/weight are not accurate.

    Args:
        names: name of each segment.
        weight: norm of the weight after the step, float64[len(names)].
        update: norm of (weight after - weight before), float64[len(names)]. Both weights are taken as they are stored.
            So the update contains weight decay, and it does not contain what rounding lost.
        grad: norm of the gradient that the update used, float64[len(names)]. This gradient is unscaled and clipped.
        angle: angle between the weight before and the weight after, in radians, float64[len(names)].
    """

    names: tuple[str, ...]
    weight: Array
    update: Array
    grad: Array
    angle: Array

    @classmethod
    def from_sums(cls, names: Sequence[str], sums: ArrayLike) -> Norms:
        """Compute norms from the sums that `AdamW.norm_sums()` returns.

        `AdamW.norm_sums(local=True)` has sums over shards. Add those of all shards of a parameter up first.

        Args:
            names: name of each segment, from `AdamW.norm_names()`.
            sums: float64[len(names), 4]. The columns are the square sum of the weight after the step, of the update and
                of the gradient, and the inner product of the weight before the step with the update.

        Raises:
            ValueError: the shape of `sums` does not match `names`.
        """
        table = np.asarray(sums, dtype=np.float64)
        if table.shape != (len(names), 4):
            raise ValueError(
                f"Norms.from_sums: sums have shape {table.shape}, {len(names)} names need ({len(names)}, 4)."
            )
        weight, update, grad, dot = table.T
        # Let b be the weight before and d the update. |b|^2 follows from |b + d|^2. The angle follows from its sine,
        # |b x d|: for a small angle the sine keeps its digits, and the cosine does not.
        before = np.maximum(weight - 2 * dot - update, 0.0)
        sine = np.sqrt(np.maximum(before * update - dot**2, 0.0))
        return cls(tuple(names), np.sqrt(weight), np.sqrt(update), np.sqrt(grad), np.arctan2(sine, before + dot))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Return all norms as floats in one flat dict, for a logger.

        Args:
            prefix: text that every key starts with.

        Returns:
            The values by `{prefix}{statistic}/{name}`. Values that are not known (NaN) are left out.

        Examples:
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
