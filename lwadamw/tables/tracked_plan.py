"""Device plan: the plan of one device and storage, and noticing that the tensors it was made from have moved."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from ..state import keys
from ..state.checks import check_gradient
from ..state.creation import create_state, lay_out
from ..state.decay import THRESHOLD, is_huber
from ..state.draws import rounding_row
from ..state.members import Member, gradients_of, local
from ..state.packing import read_weight
from ..state.storage import FLOATS, STATE, Storage, storage_of
from .plan import NO_ROUNDING, Plan, Row, Shared

_data_ptr = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous
_dtype = attrgetter("dtype")
_STATE = (*STATE, THRESHOLD)
_version = attrgetter("_version")

# Stands for the address of a gradient without elements, whose own address is 0 as that of no gradient is.
_EMPTY = 16


class TrackedPlan:
    """The plan of one device and storage together with the tensors it was built from."""

    def __init__(
        self,
        members: Sequence[Member],
        states: list[dict[str, Any]],
        storage: Storage,
        attribute: str,
        n_groups: int,
        shared: Shared,
        slot: int,
        counts: bool,
    ) -> None:
        self.members = members
        self.params = [m.param for m in members]
        self._attribute, self._grad_dtype = attribute, storage.grad
        params = [local(p) for p in self.params]
        self.plan = Plan(
            params[0].device,
            storage,
            [
                Row(
                    p,
                    {key: local(state[key]) for key in _STATE if key in state},
                    state["step"],
                    m.group_index,
                    m.segments,
                    rounding_row(m) if storage.draws else NO_ROUNDING,
                    keys.HUBER_SCALE.of(m.group) if is_huber(m.group) else None,
                )
                for m, p, state in zip(members, params, states, strict=True)
            ],
            n_groups,
            shared,
            slot,
            counts,
        )
        for state, step in zip(states, self.plan.steps.unbind(), strict=True):
            state["step"] = step
        # Distributed tensors are looked through anew each step: their local tensor may be replaced.
        self._distributed = any(map(is_not, params, self.params))
        self._state = [state[key] for state in states for key in _STATE if key in state]
        ends = list(itertools.accumulate((sum(key in state for key in _STATE) for state in states), initial=0))
        self._state_places = [slice(*place) for place in itertools.pairwise(ends)]
        self._addresses = self._current_addresses(self.params)
        self._state_addresses = self._current_addresses(self._state)
        self._contiguous = not self._distributed and all(map(_is_contiguous, params))
        # torch holds a gradient to its parameter's dtype, unless told otherwise.
        self._any_dtype = attribute != "grad" or any(getattr(p, "grad_dtype", p.dtype) != p.dtype for p in self.params)
        self._empty = [i for i, p in enumerate(params) if p.numel() == 0]
        self._copies: list[Tensor] = []
        # A rounded copy of a master weight that somebody writes to is no copy any more.
        self._mastered = states if storage.weight == "master" else []
        self._versions = [-1] * len(self._mastered)  # whatever happened before this plan is looked at once

    def _current_addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        return list(map(_data_ptr, map(local, tensors) if self._distributed else tensors))

    def is_fresh(self, verify_state: bool) -> bool:
        """Whether every parameter, and every state tensor if asked, is where the tables say."""
        if self._current_addresses(self.params) != self._addresses:
            return False
        return not verify_state or self._current_addresses(self._state) == self._state_addresses

    def gradients(self) -> list[int] | None:
        """Address of every gradient, 0 where there is none; of a copy where its memory order is not the parameter's.

        None: a gradient has come in another dtype, so that it takes another plan.
        """
        grads = gradients_of(self.params, self._attribute)
        if self._contiguous:
            try:
                addresses = list(map(_data_ptr, grads))
                if all(map(_is_contiguous, grads)) and (
                    not self._any_dtype or set(map(_dtype, grads)) == {self._grad_dtype}
                ):
                    for i in self._empty:
                        addresses[i] = _EMPTY
                    return addresses
            except (TypeError, RuntimeError):
                pass  # a missing or sparse gradient
        return self._checked_gradients(grads)

    @torch.no_grad()
    def _checked_gradients(self, grads: Sequence[Tensor | None], first: int = 0) -> list[int] | None:
        self._copies = []
        addresses = []
        for member, grad in zip(self.members[first : first + len(grads)], grads, strict=True):
            if grad is None:
                addresses.append(0)
                continue
            check_gradient(member, grad)
            p, g = local(member.param), local(grad)
            if g.dtype != self._grad_dtype and g.dtype in FLOATS:
                return None
            if g.dtype != self._grad_dtype or g.device != p.device or g.stride() != p.stride():
                g = torch.empty_like(p, dtype=self._grad_dtype).copy_(g)
                self._copies.append(g)
            addresses.append(g.data_ptr() if g.numel() else _EMPTY)
        return addresses

    def row_is_fresh(self, row: int, verify_state: bool) -> bool:
        if local(self.params[row]).data_ptr() != self._addresses[row]:
            return False
        places = self._state_places[row]
        return not verify_state or self._current_addresses(self._state[places]) == self._state_addresses[places]

    def gradient_of_row(self, row: int) -> int | None:
        """Address of one parameter's gradient, as `gradients` gives it."""
        addresses = self._checked_gradients(gradients_of(self.params[row : row + 1], self._attribute), row)
        return None if addresses is None else addresses[0]

    @torch.no_grad()
    def follow_parameters(self, row: int | None = None) -> None:
        """Take over what somebody else has written to a parameter since the last step into its master weight.

        Where the parameter still is the rounded master weight, as after swapping averaged weights in and out, that keeps
        its digits. row: of this one only.
        """
        rows: Iterable[int] = ()
        if self._mastered and (row is not None or list(map(_version, self.params)) != self._versions):
            rows = range(len(self.params)) if row is None else (row,)
        for i in rows:
            if self.params[i]._version != self._versions[i]:
                state = self._mastered[i]
                local(state["master_param"]).copy_(read_weight(self.params[i], state, "master"))

    def advance_versions(self, row: int | None = None) -> None:
        # The kernels wrote behind autograd's back; a backward through the old weights must still be an error.
        torch._C._increment_version(self.params if row is None else [self.params[row]])
        if self._mastered and row is None:
            self._versions = list(map(_version, self.params))
        elif self._mastered and row is not None:
            self._versions[row] = self.params[row]._version


def kernel_storage(member: Member, state: Mapping[str, Any]) -> Storage:
    storage = storage_of(member.param, member.gradient, member.group, state)
    return storage if storage.grad in FLOATS else storage._replace(grad=storage.param)


def complete_state(state: dict[str, Any], member: Member) -> None:
    """Create what is missing of a parameter's state; lay its arrays out in memory as the parameter is."""
    state.setdefault("step", 0.0)
    create_state(state, member.param, member.group, member.segments)
    lay_out(state, member.param)
