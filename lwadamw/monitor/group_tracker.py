"""What the steps of a run have done to the weights of each parameter group, if gradients are noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..state.arrays import Array
from ..state.groups import effective
from ..width.steady_state import Elapsed


class GroupTracker:
    """Adds every step up in one `Elapsed` per parameter group, and takes skipped steps back.

    Whether a step was skipped is known on the device only. So every step is counted when it is taken. At a reading the skipped
    steps are subtracted. They are taken to lie evenly between this reading and the last one.

    Args:
        step: the number of steps that the optimizer has taken.
        skipped_steps: the number of steps that the optimizer has skipped.
        elapsed: what earlier steps have done, one entry per parameter group. Groups that are added later start at zero.

    Attributes:
        elapsed: what all steps so far have done, one entry per parameter group.
    """

    def __init__(self, step: int, skipped_steps: int, elapsed: Sequence[Elapsed] = ()) -> None:
        self.elapsed = list(elapsed)
        self._used: list[tuple[float, float, float] | None] = [None] * len(self.elapsed)
        self._step_at_reading = step
        self._skipped = skipped_steps
        self._at_reading = [replace(e) for e in self.elapsed]

    def advance(self, groups: Sequence[Mapping[str, Any]], read_tensors: bool) -> None:
        """Count one step.

        Args:
            groups: the optimizer's `param_groups`.
            read_tensors: whether to read hyperparameters that are tensors. Reading them waits for the device. Otherwise the
                values that were read last are used.
        """
        for _ in range(len(self.elapsed), len(groups)):
            self.elapsed.append(Elapsed())
            self._at_reading.append(Elapsed())
            self._used.append(None)
        for i, group in enumerate(groups):
            known = self._used[i]
            if known is None or read_tensors or not _has_tensors(group):
                known = self._used[i] = _read(group)
            if known[1]:
                self.elapsed[i].advance(*known)

    def hyperparameters(self) -> Array:
        """Return effective lr, effective weight decay and beta1 of the last step, float64[groups, 3]."""
        return np.array(self._used, dtype=np.float64).reshape(-1, 3)

    def take_back_skipped(self, step: int, skipped_steps: int) -> None:
        """Subtract the steps since the last reading that were skipped, and begin to count for the next reading.

        Args:
            step: the step of this reading.
            skipped_steps: the number of steps that the optimizer has skipped until now.
        """
        # The optimizer's counter starts at 0 again when the optimizer is moved or loaded.
        share = max(skipped_steps - self._skipped, 0) / (step - self._step_at_reading)
        if share:
            for now, then in zip(self.elapsed, self._at_reading, strict=True):
                now.back_to(then, min(share, 1.0))
        self._skipped = skipped_steps
        self._step_at_reading = step
        self._at_reading = [replace(e) for e in self.elapsed]

    def state(self) -> list[tuple[float, ...]]:
        """Return the fields of every `Elapsed` as plain numbers."""
        return [astuple(e) for e in self.elapsed]


def _has_tensors(group: Mapping[str, Any]) -> bool:
    """Return whether some hyperparameter of a group is a tensor. Reading a tensor may wait for a device."""
    return (
        isinstance(group["lr"], Tensor)
        or isinstance(group["weight_decay"], Tensor)
        or isinstance(group["betas"][0], Tensor)
    )


def _read(group: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return effective lr, effective weight decay and beta1."""
    lr, weight_decay, _ = effective(group)
    return float(lr), float(weight_decay), float(group["betas"][0])
