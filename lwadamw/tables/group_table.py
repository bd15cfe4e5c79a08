"""Hyperparameters of all groups as the device reads them: noticing what changed, and writing just that.

A training loop may assign any value of any group between two steps, and a tensor may change without being assigned.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..kernels import layout
from ..state import decay, keys
from ..state.identity import same

# What decides which parameters the Triton backend updates, and with which state.
_FLAGS = ("amsgrad", "foreach", "fused", "differentiable")
_OPTIONAL = keys.named((keys.SEGMENTS, keys.DECAY, keys.HUBER_SCALE, *keys.STORAGE))
# The order of the first five words of a group, see kernels/layout.py.
_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


class GroupTable:
    """`words[device]` is int64[n_groups, GROUP], ready for upload."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], devices: Sequence[torch.device]) -> None:
        self.words = {device: np.zeros((len(groups), layout.GROUP), np.int64) for device in devices}
        self._flags = _read_flags(groups)
        self._has_laws = any([decay.law_of(group, f"group {i}: ") != "coupled" for i, group in enumerate(groups)])
        for words in self.words.values():
            words[:, layout.GROUP_KINDS] = [(keys.DECAY.of(g) == "corrected") << layout.CORRECTED for g in groups]
        self._referents: list[Any] = []
        self._lr_places = slice(0)
        self._has_tensors = False
        self._volatile = False  # some tensor has to be read, or copied to a device, every step
        self._copies: list[Tensor] = []

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> Literal["same", "changed", "replan"]:
        """Bring `words` up to date; "replan" if some group's flags changed, so that plans have to be made again."""
        # Every object that every group refers to, from one C loop.
        referents = gc.get_referents(*groups)
        if not self._volatile:
            if same(referents, self._referents):
                return "same"
            lrs = _column(groups, "lr")
            if self._only_lr_differs(referents, lrs):
                self._write(0, lrs)
                return "changed"
        if _read_flags(groups) != self._flags:
            return "replan"
        # With lr 1 where a law multiplies by it: the kernel does that, with lr as it is at the step.
        per_lr = (
            [decay.per_lr({**g, "lr": 1.0}, f"group {i}: ") for i, g in enumerate(groups)] if self._has_laws else []
        )
        self._referents = referents
        self._copies, self._volatile, self._has_tensors = [], False, False
        columns = {key: _column(groups, key) for key in ("lr", "eps", "weight_decay")}
        columns["beta1"], columns["beta2"] = zip(*_column(groups, "betas"), strict=True)
        for j, key in enumerate(_NUMBERS):
            self._write_numbers(j, columns[key])
        for j, width_key in enumerate(keys.WIDTH):
            self._write(layout.GROUP_MULTIPLIERS + j, [group.get(width_key.name, 1.0) for group in groups])
        if any(keys.WIDTH_WARMUP.name in group for group in groups):
            self._multiply(layout.GROUP_MULTIPLIERS, [keys.WIDTH_WARMUP.of(group) for group in groups])
        if self._has_laws:
            self._multiply(layout.GROUP_MULTIPLIERS + 1, per_lr)
        self._write(layout.GROUP_SIGN, np.where(_column(groups, "maximize"), -1.0, 1.0))
        stride = len(referents) // len(groups)
        first = next(i for i, value in enumerate(referents) if value is columns["lr"][0])
        self._lr_places = slice(first, None, stride)
        return "changed"

    def _only_lr_differs(self, referents: list[Any], lrs: tuple[Any, ...]) -> bool:
        """Whether a schedule assigned learning rates and nothing else happened; notes the new ones if so."""
        places = self._lr_places
        if self._has_tensors or len(referents) != len(self._referents) or _any_tensor(lrs):
            return False
        # Where groups came to differ in the order of their keys, the places belong to something else.
        if len(referents[places]) != len(lrs) or not all(map(is_, referents[places], lrs)):
            return False
        self._referents[places] = lrs
        return same(referents, self._referents)

    def _write(self, j: int, values: Any) -> None:
        for words in self.words.values():
            words.view(np.float64)[:, j] = values

    def _multiply(self, j: int, values: Any) -> None:
        for words in self.words.values():
            words.view(np.float64)[:, j] *= values

    def _write_numbers(self, j: int, column: tuple[Any, ...]) -> None:
        if not _any_tensor(column):
            self._write(j, column)
            for words in self.words.values():
                words[:, layout.GROUP_ADDRESSES + j] = 0
            return
        self._has_tensors = True
        for device, words in self.words.items():
            for i, value in enumerate(column):
                words.view(np.float64)[i, j], words[i, layout.GROUP_ADDRESSES + j], wide = self._scalar(value, device)
                words[i, layout.GROUP_KINDS] = words[i, layout.GROUP_KINDS] & ~(1 << j) | wide << j

    def _scalar(self, value: float | Tensor, device: torch.device) -> tuple[float, int, int]:
        """(value, address, whether float64) of a hyperparameter; a tensor already on the device is read there."""
        if not isinstance(value, Tensor):
            return value, 0, 0
        if value.device == device and value.dtype in (torch.float32, torch.float64):
            return 0.0, value.data_ptr(), int(value.dtype == torch.float64)
        self._volatile = True
        if value.device.type == "cpu":
            return float(value), 0, 0
        copy = value.to(device, torch.float32, non_blocking=True)
        self._copies.append(copy)
        return 0.0, copy.data_ptr(), 0


def _column(groups: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, ...]:
    return tuple(map(itemgetter(key), groups))


def _read_flags(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [*(_column(groups, key) for key in _FLAGS), *(tuple([g.get(key) for g in groups]) for key in _OPTIONAL)]


def _any_tensor(column: tuple[Any, ...]) -> bool:
    return any(issubclass(kind, Tensor) for kind in set(map(type, column)))
