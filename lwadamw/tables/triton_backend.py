"""Triton backend: keeps the plans of every device up to date and launches them.

Anything may change between two steps. Gradients are new tensors, hyperparameters are assigned, a framework replaces
parameters or state. So every step looks at everything, by address or by identity, and uploads or rebuilds only what is
out of date. This look is the whole cost of a step on the host. So it uses loops that run in C, such as `map` and the
comparison of lists, and no Python code per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..state.checks import capturing
from ..state.members import Member, any_gradient
from ..state.shards import Shards, Split
from ..state.transfer import moved
from ..state.whole_thresholds import WholeThresholds
from .device_totals import DeviceTotals
from .group_table import GroupTable
from .grouping import PlanKey, check_apart, complete_state, group_by_plan, split_idle
from .plan import NO_SPARE
from .request import Header, Request
from .tracked_plan import TrackedPlan

_WHOLE: Final = Shards()


class TritonBackend:
    """All parameters that the kernels update, on any number of devices.

    Making it creates the state that parameters lack. Parameters with neither a gradient nor state are left out, until
    one of them gets a gradient and the caller makes a new backend.

    Args:
        members: the parameters for the kernels. `check_state` has found nothing wrong with their state.
        groups: the optimizer's `param_groups`.
        state: the optimizer's state, by parameter; completed in place.
        skipped: int64[], number of steps skipped so far, the start of the count; None: 0.
        idle: whether to leave out all parameters with neither a gradient nor state. False: those that require a gradient
            stay in.
        shards: says how each parameter is split over processes.
        thresholds: says what the huber thresholds of split parameters need of other processes.

    Raises:
        RuntimeError: two tensors share memory. In this case nothing has been written.
    """

    @torch.no_grad()
    def __init__(
        self,
        members: Sequence[Member],
        groups: Sequence[Mapping[str, Any]],
        state: Any,
        skipped: Tensor | None = None,
        idle: bool = True,
        shards: Shards = _WHOLE,
        thresholds: WholeThresholds | None = None,
    ) -> None:
        thresholds = WholeThresholds(shards) if thresholds is None else thresholds
        self.members, self._idle = split_idle(members, state, trainable=not idle)
        check_apart(self.members, state)
        for m in self.members:
            complete_state(state[m.param], m, thresholds.first)
        members_by_plan = group_by_plan(self.members, state, shards)
        self._device_totals = _make_totals(members_by_plan, skipped)
        self._plans = [
            TrackedPlan(
                some,
                [state[m.param] for m in some],
                key,
                n_groups=len(groups),
                device_totals=self._device_totals[key.device],
                total_index=i,
                counts_skipped=i == 0,
                counts=thresholds.counts,
            )
            for i, (key, some) in enumerate(members_by_plan.items())
        ]
        self._splits = [shards.split_of(some[0]) for some in members_by_plan.values()]
        self._rows = {id(p): (tracked, row) for tracked in self._plans for row, p in enumerate(tracked.params)}
        self._table = GroupTable(groups, list(self._device_totals))
        self._had_others = False
        # Keeps the loss scale and found_inf alive that the kernels read at this step, and what they are copied from.
        self._scalars: list[Tensor] = []

    def stage(self, groups: Sequence[dict[str, Any]], request: Request, verify_state: bool) -> bool:
        """Bring every table up to date for the next step.

        Args:
            groups: the optimizer's `param_groups`.
            request: what the step does besides the update.
            verify_state: whether somebody else may have replaced a state tensor, so that the addresses of all of them
                have to be compared.

        Returns:
            False if the caller has to make a new backend before the step can happen.

        Raises:
            RuntimeError: the kernels cannot read some gradient, or the step is being captured and nobody has prepared tables
                for it. In this case nothing has been written.
        """
        captured = self._captured()
        if any_gradient(self._idle) or not all(tracked.is_fresh(verify_state) for tracked in self._plans):
            return False
        gradients = [tracked.gradients.addresses() for tracked in self._plans]
        if any(addresses is None for addresses in gradients) or not self.refresh(groups):
            return False
        self._scalars = []
        for tracked, addresses in zip(self._plans, gradients, strict=True):
            plan = tracked.plan
            with plan.on_device():
                if captured:
                    header = self._header(request, plan.device)
                    kept = (*tracked.aliases(), *tracked.gradients.copies, *self._scalars, *self._table.held())
                    plan.stage_captured(addresses or [], header, kept)
                    continue
                plan.device_totals.order.follow()
                plan.stage(addresses or [], self._header(request, plan.device))
                if self._table.capturable:
                    plan.prepare_capture()
        return True

    def _captured(self) -> bool:
        """Return whether the next step is being captured in a CUDA graph.

        Raises:
            RuntimeError: only some devices are being captured, or nobody has prepared tables for the captured step.
        """
        captured = capturing()
        for device in self._device_totals:
            if capturing(device) != captured:
                raise RuntimeError(
                    "lwadamw.AdamW: a CUDA graph is being captured on the current device or on "
                    f"{device}, but not on both. Call step() under torch.cuda.device({device.index!r}), and capture the step "
                    "on every device that has parameters."
                )
        if captured and not all(tracked.plan.can_capture for tracked in self._plans):
            raise RuntimeError(NO_SPARE)
        return captured

    @property
    def has_captures(self) -> bool:
        """Whether some CUDA graph may replay a step of this backend. Then its tables have to be kept."""
        return any(tracked.plan.captures for tracked in self._plans)

    def follow(self) -> None:
        """Let the current stream of every device wait for the last use of the tables there."""
        for totals in self._device_totals.values():
            totals.order.follow()

    def refresh(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Bring the hyperparameters of every plan up to date.

        Args:
            groups: the optimizer's `param_groups`.

        Returns:
            False if the caller has to make a new backend before the step can happen.
        """
        change = self._table.refresh(groups)
        if change == "changed":
            for tracked in self._plans:
                tracked.plan.set_groups(self._table.words[tracked.plan.device])
        return change != "replan"

    def _header(self, request: Request, device: torch.device) -> Header:
        scale, inf = (self._address(scalar, device) for scalar in (request.grad_scale, request.found_inf))
        return Header(request.max_grad_norm or 0.0, scale, inf, int(request.nonfinite == "pass"))

    def _address(self, scalar: Tensor | None, device: torch.device) -> int:
        if scalar is None:
            return 0
        there = moved(scalar, device, torch.float32)
        self._scalars += (scalar.detach(), there)
        return there.data_ptr()

    def sum_gradients(self) -> list[tuple[Split, Tensor]]:
        """Compute the square sum of this process's part of the gradients of each plan, before the loss scale is divided out.

        Returns:
            For each plan how its parameters are split over processes, and float64[1] on its device.
        """
        for tracked in self._plans:
            with tracked.plan.on_device():
                tracked.plan.sum_gradients()
        return [(split, tracked.plan.total) for split, tracked in zip(self._splits, self._plans, strict=True)]

    @torch.no_grad()
    def set_total(self, total: Tensor) -> None:
        """Give every device the square sum of all gradients of all processes. It replaces the sums of the plans.

        Args:
            total: one element.
        """
        self._had_others = True
        for device, totals in self._device_totals.items():
            totals.square_sums.zero_()
            totals.square_sums[-1].copy_(moved(total, device))

    @torch.no_grad()
    def share_totals(self, others: Sequence[Tensor], expected: bool = False) -> None:
        """Copy every square sum to every device, so that each device computes the same global norm.

        Args:
            others: square sums of other backends, each of one element.
            expected: whether other backends may have gradients at other steps.
        """
        # A replay and the steps around it may differ in whether there are others, and use the same sum.
        stale = self._had_others or (expected and self.has_captures)
        if not others and not stale and len(self._device_totals) == 1:
            return
        self._had_others = bool(others)
        for device, totals in self._device_totals.items():
            # Copies and sums happen on the current stream of the device where the tensors are, whatever the current device.
            sums = totals.square_sums
            for i, tracked in enumerate(self._plans):
                if tracked.plan.device != device:
                    sums[i : i + 1].copy_(tracked.plan.total, non_blocking=True)
            there = [moved(t, device).reshape(()) for t in others]
            sums[-1].copy_(torch.stack(there).sum() if there else torch.zeros_like(sums[-1]))

    def run(self, *, clip: bool, norms: bool) -> None:
        """Take the step that has been staged.

        Args:
            clip: whether to clip by the global norm.
            norms: whether to measure the sums that `norm_sums` reads.
        """
        for tracked in self._plans:
            with tracked.plan.on_device():
                tracked.plan.run(clip=clip, norms=norms)
            tracked.gradients.drop_copies()
            tracked.advance_versions()

    def absolute_sums(self) -> list[tuple[Sequence[Tensor], Tensor]]:
        """Return what the huber thresholds of split parameters need: for each plan its parameters, and their sums of |w|."""
        return [(t.params, t.plan.absolutes) for t in self._plans if t.plan.absolutes is not None]

    def follow_thresholds(self, totals: Sequence[Tensor]) -> None:
        """Move the huber thresholds of split parameters after a step.

        Args:
            totals: for each entry of `absolute_sums`, the sums over whole parameters, float64[n].
        """
        split = [tracked.plan for tracked in self._plans if tracked.plan.absolutes is not None]
        for plan, some in zip(split, totals, strict=True):
            with plan.on_device():
                plan.follow_thresholds(some)

    def run_one(
        self, groups: Sequence[dict[str, Any]], state: Any, p: Tensor, request: Request, verify_state: bool
    ) -> bool:
        """Take the step of one parameter alone, without clipping. A skipped step is not counted.

        Args:
            groups: the optimizer's `param_groups`.
            state: the optimizer's state, by parameter.
            p: the parameter.
            request: norms and loss scaling of this step.
            verify_state: whether somebody else may have replaced a state tensor.

        Returns:
            False if the caller has to make a new backend first. In this case the step has not happened.
        """
        tracked, row = self._rows.get(id(p), (None, 0))
        if tracked is None or not tracked.row_is_fresh(row, state, verify_state) or not self.refresh(groups):
            return False
        address = tracked.gradients.address(row)
        if address is None:
            return False
        self._scalars = []
        with tracked.plan.on_device():
            tracked.plan.device_totals.order.follow()
            header = self._header(request, tracked.plan.device)
            tracked.plan.run_row(row, address, header, request.norms)
        tracked.gradients.drop_copies()
        tracked.advance_versions(row)
        return True

    @property
    def grad_norm(self) -> Tensor | None:
        """float32[], the global norm of the last clipped step, before clipping; None if there are no parameters."""
        return self._plans[0].plan.device_totals.grad_norm if self._plans else None

    @property
    def skipped(self) -> Tensor | None:
        """int64[], number of steps that have been skipped on the device; None if there are no parameters."""
        return self._plans[0].plan.device_totals.skipped if self._plans else None

    def norm_sums(self) -> list[tuple[Sequence[Member], Tensor]]:
        """Add up what the last step has measured.

        Returns:
            For each plan its parameters and float64[n_segments, 4], as `Plan.norm_sums` returns it.
        """
        return [(tracked.members, tracked.plan.norm_sums()) for tracked in self._plans]


def _make_totals(members_by_plan: Mapping[PlanKey, object], skipped: Tensor | None) -> dict[torch.device, DeviceTotals]:
    """Make what the plans of each device share, by device, in the order of plans."""
    out = {}
    for device in dict.fromkeys(key.device for key in members_by_plan):
        counter = torch.zeros((), dtype=torch.int64, device=device)
        if skipped is not None:
            counter.copy_(skipped)
        # The last sum is the one of other backends.
        out[device] = DeviceTotals(device, len(members_by_plan) + 1, counter)
    return out
