"""What the steps of a run have done to the weights of each parameter group, if gradients are noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..state import keys
from ..state.arrays import Array
from ..state.groups import effective
from ..width.steady_state import Elapsed


class _Used(NamedTuple):
    """What a step used of a group: effective values, and whether the group has weight decay at any learning rate."""

    lr: float
    weight_decay: float
    beta1: float
    decays: bool


class GroupTracker:
    """Adds every step up in one `Elapsed` per parameter group, and takes skipped steps back.

    Whether a step was skipped is known on the device only. So every step is counted when it is taken. At a reading the skipped
    steps are subtracted. They are taken to lie evenly between this reading and the last one.

    Args:
        step: the number of steps that the optimizer has taken.
        skipped_steps: the number of steps that the optimizer has skipped.
        elapsed: what earlier steps have done, one entry per parameter group. Groups that are added later start at zero.
        skipped: how many of the steps before `step` are known to have been skipped.

    Attributes:
        elapsed: what all steps so far have done, one entry per parameter group.
        skipped: how many steps until the last reading were skipped.
    """

    def __init__(self, step: int, skipped_steps: int, elapsed: Sequence[Elapsed] = (), skipped: int = 0) -> None:
        self.elapsed = list(elapsed)
        self.skipped = skipped
        self._used: list[_Used | None] = [None] * len(self.elapsed)
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
            if known.weight_decay:
                self.elapsed[i].advance(known.lr, known.weight_decay, known.beta1)

    def hyperparameters(self) -> Array:
        """Return what the last step used of each group, float64[groups, 4].

        The columns are effective lr, effective weight decay, beta1, and 1 where the group has weight decay at some learning
        rate, else 0. With decay="corrected" the effective weight decay is 0 at lr 0, but the group still decays.
        """
        return np.array(self._used, dtype=np.float64).reshape(-1, 4)

    def take_back_skipped(self, step: int, skipped_steps: int) -> None:
        """Subtract the steps since the last reading that were skipped, and begin to count for the next reading.

        Args:
            step: the step of this reading.
            skipped_steps: the number of steps that the optimizer has skipped until now.
        """
        steps = step - self._step_at_reading
        # The optimizer's counter starts at 0 again when the optimizer is moved or loaded.
        count = min(max(skipped_steps - self._skipped, 0), steps)
        if count:
            for now, then in zip(self.elapsed, self._at_reading, strict=True):
                now.back_to(then, count / steps)
        self.skipped += count
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


def _read(group: Mapping[str, Any]) -> _Used:
    lr, weight_decay, _ = effective(group)
    decays = float(group["weight_decay"]) * keys.WIDTH_WD_MULT.of(group) > 0
    return _Used(float(lr), float(weight_decay), float(group["betas"][0]), decays)
