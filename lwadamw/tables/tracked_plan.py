"""Tracked plan: a plan and the tensors it was made from. It notices when one of these tensors is replaced."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from ..state import keys
from ..state.decay import THRESHOLD, is_huber
from ..state.draws import rounding_row
from ..state.geometry import Geometry, look
from ..state.identity import same
from ..state.members import Member, local, locals_of
from ..state.storage import STATE, Storage
from .device_totals import DeviceTotals
from .gradients import Gradients
from .grouping import PlanKey
from .memory_order import MemoryOrder
from .plan import Plan
from .row import NO_ROUNDING, Row

_data_ptr = Tensor.data_ptr
_STATE = (*STATE, THRESHOLD)


class TrackedPlan:
    """The plan of one group of parameters that have device, storage and decay law in common.

    The step counts of the parameters move into one tensor of the plan. `state["step"]` becomes a view of it.

    Args:
        members: the parameters.
        states: the state of each parameter, complete; "step" is replaced.
        key: what the parameters have in common.
        n_groups: number of the optimizer's groups.
        device_totals: what the plans of this device share.
        total_index: which of the shared square sums is the one of this plan.
        counts_skipped: whether this plan counts the skipped steps.
        counts: number of elements of the whole, by id() of each parameter that is split over processes and has huber decay.
    """

    def __init__(
        self,
        members: Sequence[Member],
        states: list[dict[str, Any]],
        key: PlanKey,
        *,
        n_groups: int,
        device_totals: DeviceTotals,
        total_index: int,
        counts_skipped: bool,
        counts: Mapping[int, int],
    ) -> None:
        self.members = members
        self.params = [m.param for m in members]
        self._order = MemoryOrder(self.params)
        self.plan = Plan(
            key.device,
            key.storage,
            [_make_row(m, state, key.storage, counts) for m, state in zip(members, states, strict=True)],
            n_groups=n_groups,
            device_totals=device_totals,
            total_index=total_index,
            counts_skipped=counts_skipped,
            split=bool(key.split),
        )
        for state, step in zip(states, self.plan.steps.unbind(), strict=True):
            state["step"] = step
        self.gradients = Gradients(members, self._order, key.attribute, key.storage.grad)
        # A DTensor's local tensor may be replaced, so for DTensors every step asks for the local tensor again.
        self._distributed = any(map(is_not, map(local, self.params), self.params))
        self._state = [state[name] for state in states for name in _STATE if name in state]
        ends = list(itertools.accumulate((sum(name in state for name in _STATE) for state in states), initial=0))
        self._state_places = [slice(*place) for place in itertools.pairwise(ends)]  # in `_state`, for each parameter
        # For a parameter that takes its step alone: its state and what it held, and how all these tensors look.
        self._states = states
        self._items = [list(state.items()) for state in states]
        self._param_looks = list(map(look, self.params))
        self._state_looks = list(map(look, self._state))
        # In memory order, as is the geometry.
        self._near_addresses = self._current_addresses(self._order.params)
        self._addresses = self._order.by_row(self._near_addresses)
        self._geometry = Geometry(list(map(local, self._order.params)))
        self._state_addresses = self._current_addresses(self._state)

    def _current_addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        return list(map(_data_ptr, locals_of(tensors) if self._distributed else tensors))

    def advance_versions(self, row: int | None = None) -> None:
        """Tell autograd that the kernels have written to the parameters.

        Autograd does not see what kernels write. Without this, a backward pass through the old weights would silently
        use the new ones instead of raising an error.

        Args:
            row: index of the only parameter that has been written to; None: all of them.
        """
        torch._C._increment_version(self._order.params if row is None else [self.params[row]])

    def is_fresh(self, verify_state: bool) -> bool:
        """Return whether all tensors are at the addresses that the tables hold, and the parameters have the same geometry.

        Args:
            verify_state: look at the state tensors too, not only at the parameters.
        """
        params = self._order.params
        held = locals_of(params) if self._distributed else params
        if list(map(_data_ptr, held)) != self._near_addresses or not self._geometry.holds(held):
            return False
        return not verify_state or self._current_addresses(self._state) == self._state_addresses

    def aliases(self) -> list[Tensor]:
        """Return new tensors with the memory of all parameters and their state, which keep this memory alive."""
        return [local(t).detach() for t in (*self.params, *self._state)]

    def row_is_fresh(self, row: int, state: Any, verify_state: bool) -> bool:
        """Return whether the tables hold for one parameter: its address and look, and those of its state.

        Args:
            row: index of the parameter.
            state: the optimizer's state by parameter.
            verify_state: look at the state too. Any of its entries may have been replaced, added or deleted.
        """
        p = self.params[row]
        if look(p) != self._param_looks[row] or local(p).data_ptr() != self._addresses[row]:
            return False
        if not verify_state:
            return True
        held, places = self._states[row], self._state_places[row]
        tensors = self._state[places]
        return (
            state.get(p) is held
            and same(list(held.items()), self._items[row])
            and list(map(look, tensors)) == self._state_looks[places]
            and self._current_addresses(tensors) == self._state_addresses[places]
        )


def _make_row(member: Member, state: dict[str, Any], storage: Storage, counts: Mapping[int, int]) -> Row:
    # The state may still have the maximum of a group with amsgrad from which the parameter has been taken.
    names = [name for name in _STATE if name in state and (name != "max_exp_avg_sq" or member.group["amsgrad"])]
    count = max(counts.get(id(member.param), member.param.numel()), 1)
    return Row(
        local(member.param),
        {name: local(state[name]) for name in names},
        state["step"],
        member.group_index,
        member.segments,
        rounding_row(member) if storage.draws else NO_ROUNDING,
        keys.HUBER_SCALE.of(member.group) / count if is_huber(member.group) else None,
    )
