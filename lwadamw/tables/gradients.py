"""Gradients: where the gradients of a plan's parameters are at this step.

A training loop usually makes new gradient tensors at every step, so their addresses are read at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..state.arrivals import arrived
from ..state.checks import check_gradient
from ..state.geometry import Geometry
from ..state.members import Member, gradients_of, is_in_memory, local, locals_of, specs_of
from ..state.storage import FLOATS
from .memory_order import MemoryOrder

_data_ptr = Tensor.data_ptr

# Stands for the address of a gradient without elements. Its own address would be 0, which means "no gradient".
_EMPTY = 16


class Gradients:
    """The gradients of the parameters of one plan.

    Args:
        members: the parameters of the plan.
        order: the order in which the parameters are read.
        attribute: the attribute of a parameter that holds its gradient, such as "grad".
        dtype: the dtype in which the kernels read every gradient.
    """

    def __init__(self, members: Sequence[Member], order: MemoryOrder, attribute: str, dtype: torch.dtype) -> None:
        self._members, self._order, self._attribute, self._dtype = members, order, attribute, dtype
        self._params = [m.param for m in members]
        self._empty = [i for i, p in enumerate(self._params) if local(p).numel() == 0]
        # Of what this process holds of gradients that the kernels could read as they were, in memory order. None until a step
        # had such a gradient for every parameter.
        self._geometry: Geometry | None = None
        # Of these gradients, if all of them were DTensors: their placements, and the objects that hold the placements.
        self._placements: list[Any] | None = None
        self._specs: list[Any] = []
        self.copies: list[Tensor] = []  # keeps the copies alive that the kernels read at this step

    def addresses(self) -> list[int] | None:
        """Return where the kernels read each gradient at this step.

        A gradient is copied if its dtype, its device or its memory order is one that the kernels cannot read, or if the numbers
        in its memory are not its elements.

        Returns:
            One address for each parameter, 0 if it has no gradient; None if a gradient has a float dtype that belongs to
            another plan.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        grads = gradients_of(self._order.params, self._attribute)
        if self._geometry is not None and (held := self._held(grads)) is not None and self._geometry.holds(held):
            addresses = self._order.by_row(list(map(_data_ptr, held)))
            for i in self._empty:
                addresses[i] = _EMPTY
            if all(addresses):
                return addresses
        return self._checked(self._order.by_row(grads))

    def _held(self, grads: list[Any]) -> list[Any] | None:
        """Return what this process holds of the gradients; None if they are placed otherwise than those before."""
        if self._placements is None:
            return grads
        specs = specs_of(grads)
        if specs is None:
            return None
        # fully_shard gives every gradient the spec of its parameter, and comparing an object with itself costs nothing.
        if specs != self._specs and [spec.placements for spec in specs] != self._placements:
            return None
        self._specs = specs
        return locals_of(grads)

    def address(self, row: int) -> int | None:
        """Return where the kernels read the gradient of one parameter at this step, as `addresses` does.

        Args:
            row: index of the parameter.
        """
        addresses = self._checked(gradients_of(self._params[row : row + 1], self._attribute), row)
        return None if addresses is None else addresses[0]

    def drop_copies(self) -> None:
        """Free the copies. Call this after the launches: memory that is free is used again in the order of the stream."""
        self.copies = []

    @torch.no_grad()
    def _checked(self, grads: Sequence[Any], first: int = 0) -> list[int] | None:
        """Look at each gradient by itself. `first` is the index of the parameter of the first gradient."""
        self.copies = []
        addresses = []
        members = self._members[first : first + len(grads)]
        there = arrived((m.param, grad, self._attribute) for m, grad in zip(members, grads, strict=True))
        for member, grad in zip(members, there, strict=True):
            if grad is None:
                addresses.append(0)
                continue
            check_gradient(member, grad)
            p, g = local(member.param), local(grad)
            if g.dtype != self._dtype and g.dtype in FLOATS:
                return None
            if g.dtype != self._dtype or g.device != p.device or g.stride() != p.stride() or not is_in_memory(g):
                g = torch.empty_like(p, dtype=self._dtype).copy_(g)
                self.copies.append(g)
            addresses.append(g.data_ptr() if g.numel() else _EMPTY)
        if self._geometry is None and len(grads) == len(self._params) and 0 not in addresses and not self.copies:
            # Gradients that were placed otherwise have been replaced.
            now = gradients_of(self._order.params, self._attribute)
            held, specs = locals_of(now), specs_of(now)
            if specs is not None or all(map(is_, now, held)):
                self._geometry, self._specs = Geometry(held), specs or []
                self._placements = None if specs is None else [spec.placements for spec in specs]
        return addresses
