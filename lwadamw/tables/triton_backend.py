"""Triton backend: keeps the plans of every device fresh and launches them.

Anything may change between two steps: gradients are new tensors, hyperparameters are rewritten, a framework swaps
parameters or state. So every step looks at all of it, by address or identity, and uploads or rebuilds only what is
stale. That look is the host's whole cost of a step, and it stays with C-level loops for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..state import keys
from ..state.checks import check_state
from ..state.decay import is_huber
from ..state.members import Member, any_gradient, is_sharded, local
from .group_table import GroupTable
from .plan import Shared
from .request import Header, Request
from .tracked_plan import TrackedPlan, complete_state, kernel_storage


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
        left_out: set[int] = set()
        self._idle: dict[str, list[Tensor]] = {}  # by where their gradients would be
        for m in members:
            if idle and m.gradient is None and not state.get(m.param):
                left_out.add(id(m.param))
                self._idle.setdefault(keys.GRAD_ATTRIBUTE.of(m.group), []).append(m.param)
        self.members = [m for m in members if id(m.param) not in left_out]
        self.sharded = next((m for m in self.members if is_sharded(m.param)), None)
        for m in self.members:
            check_state(m, state.get(m.param, {}))
        plans: dict[tuple[Any, ...], list[Member]] = {}
        for m in self.members:
            complete_state(state[m.param], m)
            attribute, huber = keys.GRAD_ATTRIBUTE.of(m.group), is_huber(m.group)
            key = (local(m.param).device, attribute, kernel_storage(m, state[m.param]), huber)
            plans.setdefault(key, []).append(m)
        # In an order that regrouping cannot change, because the global norm is summed in it.
        plan_keys = sorted(plans, key=str)
        self._shared: dict[torch.device, Shared] = {}
        self._plans: list[TrackedPlan] = []
        for slot, key in enumerate(plan_keys):
            device, attribute, storage, _ = key
            if device not in self._shared:
                counter = torch.zeros((), dtype=torch.int64, device=device)
                if skipped is not None:
                    counter.copy_(skipped)
                # One more than plans: for what other backends add up.
                self._shared[device] = Shared(device, len(plan_keys) + 1, counter)
            states = [state[m.param] for m in plans[key]]
            shared, first = self._shared[device], not self._plans
            self._plans.append(
                TrackedPlan(plans[key], states, storage, attribute, len(groups), shared, slot, counts=first)
            )
        self._rows = {id(p): (d, i) for d in self._plans for i, p in enumerate(d.params)}
        self._table = GroupTable(groups, list(self._shared))
        self._had_others = False
        self._scalars: list[Tensor] = []  # the loss scale and found_inf, where the kernels read them

    def stage(self, groups: Sequence[dict[str, Any]], request: Request, verify_state: bool) -> bool:
        """Bring every table up to date with this step; False if the plans have to be made again first.

        Raises:
            RuntimeError: a gradient the kernels cannot read; nothing has been written.
        """
        if any_gradient(self._idle) or not all(d.is_fresh(verify_state) for d in self._plans):
            return False
        gradients = [d.gradients() for d in self._plans]
        if any(addresses is None for addresses in gradients) or not self.refresh(groups):
            return False
        self._scalars = []
        for d, addresses in zip(self._plans, gradients, strict=True):
            scale, inf = (self._address(scalar, d.plan.device) for scalar in (request.grad_scale, request.found_inf))
            header = Header(request.max_grad_norm or 0.0, scale, inf, int(request.nonfinite == "pass"))
            d.plan.stage(addresses or [], header)
            d.follow_parameters()
        return True

    def refresh(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Bring hyperparameters up to date; False if the plans have to be made again first."""
        change = self._table.refresh(groups)
        if change == "changed":
            for d in self._plans:
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
        for d in self._plans:
            with d.plan.on_device():
                d.plan.sum_gradients()
        return [d.plan.total for d in self._plans]

    @torch.no_grad()
    def share_totals(self, others: Sequence[Tensor]) -> None:
        """Let every device see what other devices, and other backends in `others`, have added up."""
        if not others and not self._had_others and len(self._shared) == 1:
            return
        self._had_others = bool(others)
        for device, shared in self._shared.items():
            for slot, d in enumerate(self._plans):
                if d.plan.device != device:
                    shared.totals[slot : slot + 1].copy_(d.plan.total, non_blocking=True)
            there = [t.to(device, non_blocking=True).reshape(()) for t in others]
            shared.totals[-1].copy_(torch.stack(there).sum() if there else torch.zeros_like(shared.totals[-1]))

    def run(self, *, clip: bool, norms: bool) -> None:
        for d in self._plans:
            with d.plan.on_device():
                d.plan.run(clip=clip, norms=norms)
            d.advance_versions()

    def run_one(self, groups: Sequence[dict[str, Any]], p: Tensor, norms: bool, verify_state: bool) -> bool:
        """Take the step of one parameter alone; False if the plans have to be made again first."""
        d, row = self._rows.get(id(p), (None, 0))
        if d is None or not d.row_is_fresh(row, verify_state) or not self.refresh(groups):
            return False
        address = d.gradient_of_row(row)
        if address is None:
            return False
        d.follow_parameters(row)
        with d.plan.on_device():
            d.plan.run_row(row, address, norms)
        d.advance_versions(row)
        return True

    @property
    def grad_norm(self) -> Tensor | None:
        """float32[], the global norm the last clipped step saw, before clipping; None if there was no gradient."""
        return self._plans[0].plan.shared.grad_norm if self._plans else None

    @property
    def skipped(self) -> Tensor | None:
        """int64[], how many steps have been skipped on the device."""
        return self._plans[0].plan.shared.skipped if self._plans else None

    def norm_sums(self) -> list[tuple[Sequence[Member], Tensor]]:
        """Per plan its parameters and float64[n_segments, 4]."""
        return [(d.members, d.plan.norm_sums()) for d in self._plans]
