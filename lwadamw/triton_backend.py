"""Triton backend: keeps the plans of every device fresh and launches them.

Anything may change between two steps: gradients are new tensors, hyperparameters are rewritten, a framework swaps
parameters or state. So every step looks at all of it, by address or identity, and uploads or rebuilds only what is
stale. That look is the host's whole cost of a step, and it stays with C-level loops for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from .backends import Member, check_gradient, check_state, gradient_of, is_sharded, local
from .hyperparameters import GroupTable
from .packing import create_state, read_moment, write_moment
from .plan import Plan, Row, Shared
from .rounding import row_of
from .storage import ARRAYS, CODES, FLOATS, STATE, Storage, storage_of
from .upload import Header

_data_ptr = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous
_dtype = attrgetter("dtype")
_version = attrgetter("_version")

# Stands for the address of a gradient without elements, whose own address is 0 as that of no gradient is.
_EMPTY = 16


class DevicePlan:
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
                    {key: local(state[key]) for key in STATE if key in state},
                    state["step"],
                    m.group_index,
                    m.segments,
                    *([row_of(m)] if storage.draws else []),
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
        self._state = [state[key] for state in states for key in STATE if key in state]
        ends = list(itertools.accumulate((sum(key in state for key in STATE) for state in states), initial=0))
        self._state_places = [slice(*place) for place in itertools.pairwise(ends)]
        self._addresses = self._current_addresses(self.params)
        self._state_addresses = self._current_addresses(self._state)
        self._contiguous = not self._distributed and all(map(_is_contiguous, params))
        # torch holds a gradient to its parameter's dtype, unless told otherwise.
        self._any_dtype = attribute != "grad" or any(getattr(p, "grad_dtype", p.dtype) != p.dtype for p in self.params)
        self._empty = [i for i, p in enumerate(params) if p.numel() == 0]
        self._copies: list[Tensor] = []
        # A rounded copy of a master weight that somebody writes to is no copy any more.
        self._masters = [local(state["master_param"]) for state in states] if storage.weight == "master" else []
        self._versions: list[int] = list(map(_version, self.params)) if self._masters else []

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
        name = self._attribute
        if name == "grad":
            grads: list[Any] = [p.grad for p in self.params]
        else:
            grads = [gradient_of(p, name) for p in self.params]
        if self._contiguous:
            try:
                addresses = list(map(_data_ptr, grads))
                if all(map(_is_contiguous, grads)) and not (self._any_dtype and self._changed_dtype(grads)):
                    for i in self._empty:
                        addresses[i] = _EMPTY
                    return addresses
            except (TypeError, RuntimeError):
                pass  # a missing or sparse gradient
        return self._checked_gradients(grads)

    def _changed_dtype(self, grads: Sequence[Tensor]) -> bool:
        return set(map(_dtype, grads)) != {self._grad_dtype}

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
        addresses = self._checked_gradients([gradient_of(self.params[row], self._attribute)], row)
        return None if addresses is None else addresses[0]

    @torch.no_grad()
    def follow_parameters(self) -> None:
        """Take over what somebody else has written to a parameter since the last step into its master weight.

        Where the parameter still is the rounded master weight, as after swapping averaged weights in and out, that keeps
        its digits.
        """
        if not self._masters or list(map(_version, self.params)) == self._versions:
            return
        for p, master, version in zip(map(local, self.params), self._masters, self._versions, strict=True):
            if p._version != version:
                torch.where(master.to(p.dtype) == p, master, p.to(master.dtype), out=master)

    def note_versions(self, row: int | None = None) -> None:
        # The kernels wrote behind autograd's back; a backward through the old weights must still be an error.
        torch._C._increment_version(self.params if row is None else [self.params[row]])
        if self._masters:
            self._versions = list(map(_version, self.params))


class TritonBackend:
    """Every parameter the kernels update, on however many devices."""

    @torch.no_grad()
    def __init__(
        self,
        members: Sequence[Member],
        groups: Sequence[Mapping[str, Any]],
        state: Any,
        skipped: Tensor | None = None,
        idle: bool = True,
    ) -> None:
        """Make plans for all parameters that have a gradient or state, creating what state is missing.

        skipped: int64[], the steps skipped so far, to be counted on; None: 0
        idle: leave out parameters that have neither

        Raises:
            RuntimeError: state that does not fit its parameter; nothing has been written.
        """
        self._idle = [m for m in members if idle and m.gradient is None and not state.get(m.param)]
        left_out = {id(m.param) for m in self._idle}
        self.members = [m for m in members if id(m.param) not in left_out]
        self.sharded = next((m for m in self.members if is_sharded(m.param)), None)
        for m in self.members:
            check_state(m, state.get(m.param, {}))
        plans: dict[tuple[Any, ...], list[Member]] = {}
        for m in self.members:
            _complete(state[m.param], m)
            key = (local(m.param).device, m.group.get("grad_attribute", "grad"), _storage(m, state[m.param]))
            plans.setdefault(key, []).append(m)
        # In an order that regrouping cannot change, because the global norm is summed in it.
        keys = sorted(plans, key=str)
        self._shared: dict[torch.device, Shared] = {}
        self._devices: list[DevicePlan] = []
        for slot, key in enumerate(keys):
            device, attribute, storage = key
            if device not in self._shared:
                counter = torch.zeros((), dtype=torch.int64, device=device)
                if skipped is not None:
                    counter.copy_(skipped)
                # One more than plans: for what other backends add up.
                self._shared[device] = Shared(device, len(keys) + 1, counter)
            states = [state[m.param] for m in plans[key]]
            shared, first = self._shared[device], not self._devices
            self._devices.append(
                DevicePlan(plans[key], states, storage, attribute, len(groups), shared, slot, counts=first)
            )
        self._rows = {id(p): (d, i) for d in self._devices for i, p in enumerate(d.params)}
        self._table = GroupTable(groups, list(self._shared))
        self._scalars: list[Tensor] = []  # the loss scale and found_inf, where the kernels read them

    def stage(
        self,
        groups: Sequence[dict[str, Any]],
        verify_state: bool,
        max_grad_norm: float,
        regardless: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """Bring every table up to date with this step; False if the plans have to be made again first.

        Raises:
            RuntimeError: a gradient the kernels cannot read; nothing has been written.
        """
        if any(m.gradient is not None for m in self._idle):
            return False
        if not all(d.is_fresh(verify_state) for d in self._devices):
            return False
        gradients = [d.gradients() for d in self._devices]
        if any(addresses is None for addresses in gradients) or not self.refresh(groups):
            return False
        self._scalars = []
        for d, addresses in zip(self._devices, gradients, strict=True):
            scale, inf = (self._address(scalar, d.plan.device) for scalar in (grad_scale, found_inf))
            d.plan.stage(addresses or [], Header(max_grad_norm, scale, inf, int(regardless)))
            d.follow_parameters()
        return True

    def refresh(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Bring hyperparameters up to date; False if the plans have to be made again first."""
        change = self._table.refresh(groups)
        if change == "changed":
            for d in self._devices:
                d.plan.set_groups(self._table.words[d.plan.device])
        return change != "replan"

    def _address(self, scalar: Tensor | None, device: torch.device) -> int:
        if scalar is None:
            return 0
        there = scalar.to(device, torch.float32, non_blocking=True)
        self._scalars.append(there)
        return there.data_ptr()

    def sum_gradients(self) -> list[Tensor]:
        """Sums of squares of all gradients, each float64[1], before unscaling.

        Raises:
            RuntimeError: other processes hold parts of a parameter, which a global norm would miss.
        """
        if self.sharded is not None:
            name, p = self.sharded.name, self.sharded.param
            raise RuntimeError(
                f"max_grad_norm with {name!r} {tuple(p.shape)} sharded over processes: this one holds "
                f"{tuple(local(p).shape)} and cannot see the global norm. "
                "Call torch.nn.utils.clip_grad_norm_ before step() and leave max_grad_norm out."
            )
        for d in self._devices:
            with d.plan.on_device():
                d.plan.sum_gradients()
        return [d.plan.total for d in self._devices]

    @torch.no_grad()
    def share_totals(self, others: Sequence[Tensor]) -> None:
        """Let every device see what other devices, and other backends, have added up."""
        for device, shared in self._shared.items():
            for slot, d in enumerate(self._devices):
                if d.plan.device != device:
                    shared.totals[slot : slot + 1].copy_(d.plan.total, non_blocking=True)
            if others:
                there = torch.stack([t.to(device, non_blocking=True).reshape(()) for t in others])
                shared.totals[-1].copy_(there.sum())
            else:
                shared.totals[-1].zero_()

    def run(self, *, clip: bool, norms: bool) -> None:
        for d in self._devices:
            with d.plan.on_device():
                d.plan.run(clip=clip, norms=norms)
            d.note_versions()

    def run_one(self, groups: Sequence[dict[str, Any]], p: Tensor, norms: bool, verify_state: bool) -> bool:
        """Take the step of one parameter alone; False if the plans have to be made again first."""
        d, row = self._rows.get(id(p), (None, 0))
        if d is None or not d.row_is_fresh(row, verify_state) or not self.refresh(groups):
            return False
        address = d.gradient_of_row(row)
        if address is None:
            return False
        d.follow_parameters()
        with d.plan.on_device():
            d.plan.run_row(row, address, norms)
        d.note_versions(row)
        return True

    @property
    def several(self) -> bool:
        """Whether there is more than one device, so that totals have to be copied."""
        return len(self._shared) > 1

    @property
    def grad_norm(self) -> Tensor | None:
        """float32[], the global norm the last clipped step saw, before clipping; None if there was no gradient."""
        return self._devices[0].plan.shared.grad_norm if self._devices else None

    @property
    def skipped(self) -> Tensor | None:
        """int64[], how many steps have been skipped on the device."""
        return self._devices[0].plan.shared.skipped if self._devices else None

    def norm_sums(self) -> list[tuple[Sequence[Member], Tensor]]:
        """Per plan its parameters and float64[n_segments, 4]."""
        return [(d.members, d.plan.norm_sums()) for d in self._devices]


def _storage(member: Member, state: Mapping[str, Any]) -> Storage:
    storage = storage_of(member.param, member.gradient, member.group, state)
    return storage if storage.grad in FLOATS else storage._replace(grad=storage.param)


def _complete(state: dict[str, Any], member: Member) -> None:
    """Create what is missing of a parameter's state; lay its arrays out in memory as the parameter is."""
    p = member.param
    state.setdefault("step", 0.0)
    create_state(state, p, member.group, member.segments)
    for key in ARRAYS:
        if key in state and local(state[key]).stride() != local(p).stride():
            old = state[key]
            values = read_moment(state, key) if old.dtype in CODES else local(old)
            state[key] = torch.empty_like(p, dtype=old.dtype)
            if old.dtype in CODES:
                write_moment(state, key, torch.empty_like(local(p), dtype=torch.float32).copy_(values))
            else:
                local(state[key]).copy_(values)
