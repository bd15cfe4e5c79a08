"""Group table: the hyperparameters of all groups as the device reads them.

A training loop may assign any value of any group between two steps. If a hyperparameter is a tensor, its value may also
change without an assignment. This module notices what has changed and rewrites only that.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from numbers import Real
from operator import is_, itemgetter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..kernels import layout
from ..state import decay, keys
from ..state.groups import check_numbers
from ..state.identity import same, snapshot
from ..state.transfer import moved

# The keys that decide which parameters the kernels update, and with which state: plans depend on their values.
_FLAGS = ("amsgrad", "foreach", "fused", "differentiable")
# Names decide about segments and random bits.
_OPTIONAL_FLAGS = ("param_names", *keys.named((keys.SEGMENTS, keys.DECAY, keys.HUBER_SCALE, *keys.STORAGE)))
# The order of the first five words of a group, see GROUP in kernels/layout.py.
_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


class GroupTable:
    """The words of every group for every device, and what the groups held when these words were written.

    `words[device]` is int64[n_groups, GROUP]; kernels/layout.py says which word holds which number. A hyperparameter that
    is a tensor on the device is not read by the host. The table holds its address instead.

    Args:
        groups: the optimizer's `param_groups`.
        devices: the devices of all plans.

    Raises:
        ValueError: some group has a decay law that does not exist.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], devices: Sequence[torch.device]) -> None:
        self.words = {device: np.zeros((len(groups), layout.GROUP), np.int64) for device in devices}
        self._flags = _read_flags(groups)
        self._has_laws = any([decay.law_of(group, f"group {i}: ") != "coupled" for i, group in enumerate(groups)])
        for words in self.words.values():
            words[:, layout.GROUP_KINDS] = [(keys.DECAY.of(g) == "corrected") << layout.CORRECTED for g in groups]
        # Every object that every group referred to when the words were written, with copies of lists and dicts.
        self._referents: list[Any] = []
        self._lr_places = slice(0)  # where among the referents the learning rates are
        self._has_tensors = False  # whether some hyperparameter is a tensor
        # Whether some tensor is not on the device in a dtype that the kernels read. Its value is then read by the host, or
        # copied to the device, at every step.
        self._volatile = False
        # Keeps the copies alive that the kernels read at this step, and what they are made of: a graph makes them again.
        self._copies: list[Tensor] = []
        self._tensors: list[Tensor] = []  # hyperparameters that the kernels read where they are
        self._addresses: list[int] = []  # where they were when the words were written
        self.capturable = False  # whether some group allows the step to be captured in a CUDA graph

    def held(self) -> list[Tensor]:
        """Return tensors with the memory of every hyperparameter that the kernels read, which keep this memory alive."""
        return [*(t.detach() for t in self._tensors), *self._copies]

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> Literal["same", "changed", "replan"]:
        """Bring `words` up to date.

        Args:
            groups: the optimizer's `param_groups`.

        Returns:
            "same": no word has changed. "changed": some word may have changed. "replan": the plans have to be made again,
            because a value has changed that decides which parameters the kernels update and with which state.

        Raises:
            ValueError: some group has a `peak_lr` that is not a positive number, and its decay law divides by it.
        """
        # One loop in C collects every object that every group refers to.
        referents = gc.get_referents(*groups)
        if not self._volatile:
            if same(referents, self._referents) and list(map(Tensor.data_ptr, self._tensors)) == self._addresses:
                return "same"
            lrs = _column(groups, "lr")
            if self._only_lr_differs(referents, lrs):
                self._write(0, lrs)
                return "changed"
        if _read_flags(groups) != self._flags:
            return "replan"
        self._rewrite(groups, referents)
        return "changed"

    def _only_lr_differs(self, referents: list[Any], lrs: tuple[Any, ...]) -> bool:
        """Return whether somebody assigned learning rates, numbers for numbers, and nothing else. Remember the new ones."""
        places = self._lr_places
        if self._has_tensors or len(referents) != len(self._referents) or not _only_numbers(lrs):
            return False
        # If the groups do not all have their keys in the same order, other objects than the learning rates are there.
        if len(referents[places]) != len(lrs) or not all(map(is_, referents[places], lrs)):
            return False
        self._referents[places] = lrs
        return same(referents, self._referents)

    def _rewrite(self, groups: Sequence[Mapping[str, Any]], referents: list[Any]) -> None:
        """Write every word of every group."""
        for index, group in enumerate(groups):
            check_numbers(group, f"group {index}: ")
        per_lr = self._decay_multipliers(groups)
        self._referents = snapshot(referents)
        self._copies, self._tensors, self._volatile, self._has_tensors = [], [], False, False
        self.capturable = any(_column(groups, "capturable"))
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
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _decay_multipliers(self, groups: Sequence[Mapping[str, Any]]) -> list[float | Tensor]:
        """Return by what each group's decay law multiplies weight_decay; empty if all laws are "coupled".

        The law "corrected" also multiplies by lr. The kernel does that with the lr of the step, so here lr counts as 1.
        """
        if not self._has_laws:
            return []
        return [decay.per_lr({**group, "lr": 1.0}, f"group {i}: ") for i, group in enumerate(groups)]

    def _write(self, j: int, values: Any) -> None:
        for words in self.words.values():
            words.view(np.float64)[:, j] = values

    def _multiply(self, j: int, values: Any) -> None:
        for words in self.words.values():
            words.view(np.float64)[:, j] *= values

    def _write_numbers(self, j: int, column: tuple[Any, ...]) -> None:
        """Write hyperparameter `j` of every group, each a number or a tensor of one element."""
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
        """Return the value of a hyperparameter, or 0 and its address on the device, and whether it is float64 there."""
        if not isinstance(value, Tensor):
            return value, 0, 0
        if value.device == device and value.dtype in (torch.float32, torch.float64):
            self._tensors.append(value)
            return 0.0, value.data_ptr(), int(value.dtype == torch.float64)
        self._volatile = True
        if value.device.type == "cpu":
            return float(value), 0, 0
        copy = moved(value, device, torch.float32)
        self._copies += (value.detach(), copy)
        return 0.0, copy.data_ptr(), 0


def _column(groups: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, ...]:
    return tuple(map(itemgetter(key), groups))


def _read_flags(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    optional = (tuple(snapshot(g.get(key) for g in groups)) for key in _OPTIONAL_FLAGS)
    return [*(_column(groups, key) for key in _FLAGS), *optional]  # with copies of lists and dicts


def _only_numbers(column: tuple[Any, ...]) -> bool:
    kinds = set(map(type, column))
    return kinds <= {float, int} or all(issubclass(kind, Real) for kind in kinds)


def _any_tensor(column: tuple[Any, ...]) -> bool:
    return any(issubclass(kind, Tensor) for kind in set(map(type, column)))
