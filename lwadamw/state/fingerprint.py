"""Fingerprint: everything that tables and buckets were made from, so that a step notices whoever has changed it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry
from .identity import same
from .members import ParamGroups, local, locals_of

State = Mapping[Any, dict[str, Any]]


class Fingerprint:
    """The parameters of an optimizer as they were at one moment, and its state as it was when `follow_state` was last called.

    The fingerprint holds as long as the groups have the same parameters in the same order, every parameter in `looked_at` has
    the same shape, strides, dtype and device, and the state has the same dicts with the same objects.

    Three things are not part of it. What a tensor contains may change at any time. Whoever keeps an address compares the
    address, and the geometry that goes with it, himself. The geometry of a state tensor is looked at when tables are made
    (`check_state`): somebody who shrinks a state tensor through `.data`, and leaves it at its address and its parameter as it
    is, is not seen.

    Args:
        groups: an optimizer's `param_groups`.
        looked_at: the parameters whose geometry is compared.
    """

    def __init__(self, groups: ParamGroups, looked_at: Iterable[Tensor]) -> None:
        self._params = [list(group["params"]) for group in groups]
        self._held = _Held(looked_at)
        self._dicts: list[dict[str, Any]] | None = None  # not known yet
        self._referents: list[Any] = []

    def follow_state(self, state: State) -> None:
        """Take the present state as the one to compare with, because the optimizer itself has changed it.

        Args:
            state: the optimizer's state by parameter.
        """
        self._dicts = list(state.values())
        self._referents = gc.get_referents(*state.values())

    def lists_hold(self, groups: ParamGroups) -> bool:
        """Return whether every group has the same parameters in the same order.

        Args:
            groups: the optimizer's `param_groups`.
        """
        return same([group["params"] for group in groups], self._params)

    def holds(self, groups: ParamGroups, state: State, verify_state: bool) -> bool:
        """Return whether nothing that belongs to the fingerprint has changed.

        Args:
            groups: the optimizer's `param_groups`.
            state: the optimizer's state by parameter.
            verify_state: look at the state too, because somebody else may have changed it.
        """
        if not self.lists_hold(groups) or not self._held.holds():
            return False
        if not verify_state:
            return True
        return (
            self._dicts is not None
            and len(state) == len(self._dicts)
            and all(map(is_, state.values(), self._dicts))
            and same(gc.get_referents(*state.values()), self._referents)
        )


class _Held:
    """The local tensors of some tensors, and their geometry. Tensors that are not strided are left out."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [t for t in tensors if local(t).layout == torch.strided]
        held = list(map(local, self._tensors))
        # The local tensor of a DTensor may be replaced, so every look has to ask for it again.
        self._wrapped = not same(held, self._tensors)
        self._geometry = Geometry(held)

    def holds(self) -> bool:
        return self._geometry.holds(locals_of(self._tensors) if self._wrapped else self._tensors)
