"""Triton backend: keeps a plan per device fresh and launches it.

Anything may change between two steps: gradients are new tensors, hyperparameters are rewritten, a framework swaps
parameters or state. So every step looks at all of it, by address or identity, and uploads or rebuilds only what is
stale. That look is the host's whole cost of a step, and it stays with C-level loops for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from .backends import MOMENTS, Member, check_gradient, check_state, create_moments, is_sharded, local
from .hyperparameters import GroupTable
from .plan import Plan, Row

_data_ptr = Tensor.data_ptr
_is_contiguous = Tensor.is_contiguous

# Stands for the address of a gradient without elements, whose own address is 0 as that of no gradient is.
_EMPTY = 16


class DevicePlan:
    """The plan of one device together with the tensors it was built from."""

    def __init__(
        self, device: torch.device, members: Sequence[Member], states: list[dict[str, Any]], n_groups: int
    ) -> None:
        self.members = members
        self.params = [m.param for m in members]
        params = [local(p) for p in self.params]
        moments = [[local(state[key]) if key in state else None for key in MOMENTS] for state in states]
        self.plan = Plan(
            device,
            [
                Row(p, *ms, state["step"], m.group_index, m.segments)  # type: ignore[call-arg,arg-type]
                for m, p, ms, state in zip(members, params, moments, states, strict=True)
            ],
            n_groups,
        )
        for state, step in zip(states, self.plan.steps.unbind(), strict=True):
            state["step"] = step
        # Distributed tensors are looked through anew each step: their local tensor may be replaced.
        self._distributed = any(map(is_not, params, self.params))
        self._moments = [state[key] for state in states for key in MOMENTS if key in state]
        self._addresses = self._current_addresses(self.params)
        self._moment_addresses = self._current_addresses(self._moments)
        self._contiguous = not self._distributed and all(map(_is_contiguous, params))
        self._empty = [i for i, p in enumerate(params) if p.numel() == 0]
        self._copies: list[Tensor] = []

    def _current_addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        return list(map(_data_ptr, map(local, tensors) if self._distributed else tensors))

    def is_fresh(self, verify_state: bool) -> bool:
        """Whether every parameter, and every moment if asked, is where the tables say."""
        if self._current_addresses(self.params) != self._addresses:
            return False
        return not verify_state or self._current_addresses(self._moments) == self._moment_addresses

    def gradients(self) -> list[int]:
        """Address of every gradient, 0 where there is none; of a copy where its memory order is not the parameter's."""
        grads: list[Any] = [p.grad for p in self.params]
        if self._contiguous:
            try:
                addresses = list(map(_data_ptr, grads))
                if all(map(_is_contiguous, grads)):
                    for i in self._empty:
                        addresses[i] = _EMPTY
                    return addresses
            except (TypeError, RuntimeError):
                pass  # a missing or sparse gradient
        return self._checked_gradients(grads)

    @torch.no_grad()
    def _checked_gradients(self, grads: Sequence[Tensor | None]) -> list[int]:
        self._copies = []
        addresses = []
        for member, grad in zip(self.members, grads, strict=True):
            if grad is None:
                addresses.append(0)
                continue
            check_gradient(member, grad)
            p, g = local(member.param), local(grad)
            if g.dtype != p.dtype or g.device != p.device or g.stride() != p.stride():
                g = torch.empty_like(p).copy_(g)
                self._copies.append(g)
            addresses.append(g.data_ptr() if g.numel() else _EMPTY)
        return addresses


class TritonBackend:
    """Every parameter the kernels update, on however many devices."""

    @torch.no_grad()
    def __init__(self, members: Sequence[Member], groups: Sequence[Mapping[str, Any]], state: Any) -> None:
        """Make plans for all parameters that have a gradient or state, creating what state is missing.

        Raises:
            RuntimeError: state that does not fit its parameter; nothing has been written.
        """
        self._idle = [m.param for m in members if m.param.grad is None and not state.get(m.param)]
        idle = set(map(id, self._idle))
        self.members = [m for m in members if id(m.param) not in idle]
        self.sharded = next((m for m in self.members if is_sharded(m.param)), None)
        by_device: dict[torch.device, list[Member]] = {}
        for m in self.members:
            check_state(m, state.get(m.param, {}))
            by_device.setdefault(local(m.param).device, []).append(m)
        for m in self.members:
            _complete(state[m.param], m)
        self._devices = [
            DevicePlan(device, ms, [state[m.param] for m in ms], len(groups)) for device, ms in by_device.items()
        ]
        self._table = GroupTable(groups, list(by_device))
        self._scalars: list[Tensor] = []  # the loss scale and found_inf, where the kernels read them

    def stage(
        self,
        groups: Sequence[dict[str, Any]],
        verify_state: bool,
        max_grad_norm: float,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> bool:
        """Bring every table up to date with this step; False if the plans have to be made again first.

        Raises:
            RuntimeError: a gradient the kernels cannot read; nothing has been written.
        """
        if any(p.grad is not None for p in self._idle) or not all(d.is_fresh(verify_state) for d in self._devices):
            return False
        gradients = [d.gradients() for d in self._devices]
        change = self._table.refresh(groups)
        if change == "replan":
            return False
        if change == "changed":
            for d in self._devices:
                d.plan.set_groups(self._table.words[d.plan.device])
        self._scalars = []
        for d, addresses in zip(self._devices, gradients, strict=True):
            d.plan.stage(addresses, max_grad_norm, self._address(grad_scale, d), self._address(found_inf, d))
        return True

    def _address(self, scalar: Tensor | None, d: DevicePlan) -> int:
        if scalar is None:
            return 0
        there = scalar.to(d.plan.device, torch.float32, non_blocking=True)
        self._scalars.append(there)
        return there.data_ptr()

    def sum_gradients(self) -> list[Tensor]:
        """Sum of squares of all gradients on each device, float64[1], before unscaling.

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
    def set_total(self, totals: Sequence[Tensor]) -> None:
        """Clip by the norm over several sums of squares, of other devices and backends too."""
        sums = []
        for d in self._devices:
            there = [t.to(d.plan.device, non_blocking=True).reshape(1) for t in totals]
            sums.append(torch.stack(there).sum(0))
        for d, total in zip(self._devices, sums, strict=True):
            d.plan.total.copy_(total)

    def run(self, *, clip: bool, norms: bool) -> None:
        for d in self._devices:
            with d.plan.on_device():
                d.plan.run(clip=clip, norms=norms)
            # The kernels wrote behind autograd's back; a backward through the old weights must still be an error.
            torch._C._increment_version(d.params)

    @property
    def grad_norm(self) -> Tensor | None:
        """float32[], the global norm the last clipped step saw, before clipping; None if there was no gradient."""
        return self._devices[0].plan.grad_norm if self._devices else None

    def norm_sums(self) -> list[tuple[Sequence[Member], Tensor]]:
        """Per device its parameters and float64[n_segments, 4]."""
        return [(d.members, d.plan.norm_sums()) for d in self._devices]


def _complete(state: dict[str, Any], member: Member) -> None:
    """Create what is missing of a parameter's state; lay its moments out in memory as the parameter is."""
    p = member.param
    state.setdefault("step", 0.0)
    create_moments(state, p, member.group["amsgrad"])
    for key in MOMENTS:
        if key in state and local(state[key]).stride() != local(p).stride():
            state[key] = torch.empty_like(p).copy_(state[key])
