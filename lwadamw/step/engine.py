"""Engine: takes one step. It gives every parameter of an optimizer to a backend and collects what the step measured.

Everything the engine holds can be rebuilt from the groups and the state. So a framework may copy, pickle or rearrange an
optimizer at any time.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state.checks import capturing, check_capturable, check_layouts, check_not_captured, check_real, check_state
from ..state.collectives import CLIP, STEP, Call
from ..state.companions import settle
from ..state.fingerprint import Fingerprint, State
from ..state.geometry import look
from ..state.members import Member, ParamGroups, is_elsewhere, local, members_of
from ..state.naming import Naming
from ..state.saved_form import from_saved
from ..state.shards import Shards, Split
from ..state.storage import check_options
from ..state.transfer import moved
from ..state.whole_thresholds import WholeThresholds, check_threshold_alone
from ..tables.request import Request
from .backends import use_triton
from .clipping import clip_factor
from .joined_sums import Table, join_sums, whole_sums
from .nonfinite import DelayedNormCheck
from .torch_backend import TorchBackend
from .waiting import Waiting

if TYPE_CHECKING:
    from ..tables.triton_backend import TritonBackend


class Engine:
    """The backends of one optimizer, and the step over all of them.

    Args:
        backend: the optimizer's argument `backend`: None, "triton" or "torch".
        naming: the names of the optimizer's parameters.
        shards: says how each parameter is split over processes.
    """

    def __init__(self, backend: str | None, naming: Naming, shards: Shards) -> None:
        self._backend, self._naming, self._shards = backend, naming, shards
        # Skipped steps, int64[]. Counted here for the torch backend alone; a Triton backend goes on from this number.
        self._skipped: Tensor | None = None
        self._thresholds = WholeThresholds(shards)
        self._norm_check = DelayedNormCheck()
        self._waiting = Waiting()
        self._captured: list[TritonBackend] = []  # former backends whose tables some CUDA graph still reads
        self._forget()

    def _forget(self) -> None:
        """Drop all that depends on the parameters and the state that were there when `_sort` ran."""
        self._fingerprint: Fingerprint | None = None  # what the backends were made from
        self._triton: TritonBackend | None = None
        self._torch = TorchBackend(self._thresholds)
        self._torch_members: list[Member] = []
        # Gradient release. The member of each parameter, by id() of the parameter.
        self._members: dict[int, Member] = {}
        self._splits: dict[Split, list[Member]] = {}  # DTensors that are split over processes, by how they are split
        # The parameters of the torch backend as they were, by id(). See `released_member`.
        self._looks: dict[int, tuple[Any, ...]] = {}
        # Parameters of the torch backend that take their steps one by one, each with a backend of its own. By id().
        self._released: dict[int, tuple[Member, TorchBackend]] = {}
        self.grad_norm: Tensor | None = None

    def look_again(self) -> None:
        """Sort the parameters again in the next step, because their names or what others hold of them may have changed."""
        self._skipped = self.skipped
        self.keep_captures(self)
        self._forget()

    def has_plain_shards(self, groups: ParamGroups) -> bool:
        """Return whether some parameters of the groups are shards and no DTensors. Only new parameters are looked at."""
        if self._fingerprint is None or not self._fingerprint.lists_hold(groups):
            self._shards.look(members_of(groups))
        return self._shards.has_plain_shards

    def uses_triton(self, groups: ParamGroups) -> bool:
        """Return whether the Triton backend updates any parameter of the groups."""
        return any(use_triton(m, {}, self._backend) for m in members_of(groups))

    @property
    def skipped(self) -> Tensor | None:
        """Number of skipped steps, int64[] on the device. None if no step so far could have been skipped."""
        counter = None if self._triton is None else self._triton.skipped
        return self._skipped if counter is None else counter

    def step(self, groups: ParamGroups, state: State, request: Request, *, verify_state: bool) -> None:
        """Update all parameters once. All checks come before the first write.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter. Missing state is created.
            request: clipping, norms and loss scaling of this step.
            verify_state: check whether any state tensor was replaced or moved. Set this if a caller outside the optimizer
                has had access to `state`.

        Raises:
            RuntimeError: a parameter, a gradient or state cannot be used. Nothing has been written then. With
                nonfinite="raise" also: the global gradient norm of this or of an earlier step was not finite.
        """
        if capturing():
            check_capturable(groups)
        else:
            self._norm_check.raise_if_arrived()
        check_real(members_of(groups))
        # State that is created in inference mode could not be updated outside of it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if not self._waiting.over:  # before state is made for parameters that have a gradient
                self._waiting.look(groups, state)
            self._prepare(groups, state, request, verify_state)
            self._released.clear()  # their norms are those of an earlier step
            if request.max_grad_norm is None:
                self._run(request)
            else:
                self._run_clipped(request)
            if self._thresholds.any:
                self._follow_thresholds()
            # If a GradScaler has set found_inf, the scaler deals with the non-finite gradients.
            checked = request.nonfinite == "raise" and request.max_grad_norm is not None and request.found_inf is None
            if checked and self.grad_norm is not None and not capturing():
                self._norm_check.submit(self.grad_norm)

    @torch.no_grad()
    def measure_gradients(self, groups: ParamGroups, state: State, request: Request, *, verify_state: bool) -> Tensor:
        """Return the global norm of the gradients as they are now, float32[] on the device, without taking a step.

        Arguments and errors are those of `step`. State that is missing is created.
        """
        check_real(members_of(groups))
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._prepare(groups, state, request, verify_state)
            totals = self._totals(CLIP)
            return clip_factor(totals, request)[0] if totals else torch.zeros((), device="cpu")

    def _totals(self, call: Call) -> list[Tensor]:
        """Return sums that add up to the square sum of all gradients before unscaling. The Triton backend gets them too."""
        sums = [] if self._triton is None else self._triton.sum_gradients()
        torch_sums = self._torch.sum_gradients(self._shards)
        whole = self._shards.total(sums + torch_sums, self._splits, call)
        if self._triton is not None:
            if whole is None:
                self._triton.share_totals([total for _, total in torch_sums], bool(self._torch_members))
            else:
                self._triton.set_total(whole)
        return [total for _, total in sums + torch_sums] if whole is None else [whole]

    def _follow_thresholds(self) -> None:
        """Move the huber thresholds of parameters that are split over processes. This is collective."""
        of_triton = [] if self._triton is None else self._triton.absolute_sums()
        totals = self._thresholds.totals(of_triton + self._torch.absolute_sums())
        if self._triton is not None:
            self._triton.follow_thresholds(totals[: len(of_triton)])
        self._torch.follow_thresholds(totals[len(of_triton) :])

    def _run(self, request: Request) -> None:
        """Run the backends without clipping."""
        if self._triton is not None:
            self._triton.run(clip=False, norms=request.norms)
        if self._torch.buckets:
            self._torch.run(
                factor=None, grad_scale=request.grad_scale, found_inf=request.found_inf, norms=request.norms
            )
            if self._triton is None and request.found_inf is not None:
                self.count_skipped(request.found_inf)

    def _run_clipped(self, request: Request) -> None:
        """Run the backends with gradients clipped by the norm over both backends."""
        triton_backend, torch_backend = self._triton, self._torch
        totals = self._totals(STEP)
        measured = None
        if triton_backend is not None:
            triton_backend.run(clip=True, norms=request.norms)
            measured = self.grad_norm = triton_backend.grad_norm
        # A process without parameters, or without any gradient, has totals of others, and shows their norm.
        if torch_backend.buckets or (measured is None and totals):
            norm, factor, stop = clip_factor(totals, request)
            torch_backend.run(factor=factor, grad_scale=None, found_inf=stop, norms=request.norms)
            if measured is None:
                self.grad_norm = norm
                if stop is not None:
                    self.count_skipped(stop)

    def count_skipped(self, stop: Tensor) -> None:
        """Count a step as skipped if `stop` is not zero, without waiting for the device.

        Args:
            stop: one element.
        """
        counter = self.skipped
        if counter is None:
            counter = self._skipped = torch.zeros((), dtype=torch.int64, device=stop.device)
        counter += moved(stop.reshape(()) != 0, counter.device)

    def released_member(self, groups: ParamGroups, state: State, p: Tensor) -> Member | None:
        """Return the member of a parameter that is about to take its step alone, or None if it is in no group.

        The parameters are sorted again if the groups have other parameters than before, or if this parameter belongs to
        the torch backend and has another shape, other strides, another dtype or another device than before.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.
            p: the parameter.
        """
        listed = self._fingerprint is not None and self._fingerprint.lists_hold(groups)
        if not listed or (id(p) in self._looks and self._looks[id(p)] != look(p)):
            self._sort_released(groups, state)
        return self._members.get(id(p))

    def step_released(
        self, groups: ParamGroups, state: State, member: Member, request: Request, *, verify_state: bool
    ) -> None:
        """Gradient release: update one parameter. Its gradient is complete, those of other parameters may not be.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter. Missing state is created.
            member: what `released_member` has just returned for a parameter that has a gradient.
            request: norms and loss scaling of this step.
            verify_state: as in `step`.

        Raises:
            RuntimeError: the parameter, its gradient or its state cannot be used, or the step is being captured in a CUDA
                graph. Then the parameter has not been changed.
        """
        p, found = member.param, member
        check_threshold_alone(member, self._shards)
        check_not_captured(member)
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            for _ in range(3):
                if id(p) in self._looks:
                    self._step_torch_member(found, groups, state, request)
                    return
                if self._triton is not None and self._triton.run_one(groups, state, p, request, verify_state):
                    return
                self._sort_released(groups, state)
                found = self._members[id(p)]
        raise RuntimeError(
            f"lwadamw.AdamW: {member.name!r} {tuple(p.shape)}, its group or its state is being replaced while it takes its "
            "step inside backward."
        )

    def _step_torch_member(self, member: Member, groups: ParamGroups, state: State, request: Request) -> None:
        _, torch_backend = self._released.setdefault(id(member.param), (member, TorchBackend(self._thresholds)))
        torch_backend.prepare([member], groups, state, fresh=False)
        torch_backend.run(factor=None, grad_scale=request.grad_scale, found_inf=request.found_inf, norms=request.norms)
        if request.norms:
            torch_backend.measure()
            for bucket in torch_backend.buckets:
                bucket.skipped = False  # what was measured is right for a skipped step too

    def _sort_released(self, groups: ParamGroups, state: State) -> None:
        """Give every parameter to a backend. Keep what the torch backend has measured of steps inside backward."""
        released = self._released
        self._sort(groups, state, idle=False)
        for key, (_, torch_backend) in released.items():
            if key in self._looks:
                self._released[key] = (self._members[key], torch_backend)

    def _prepare(self, groups: ParamGroups, state: State, request: Request, verify_state: bool) -> None:
        """Make both backends ready for this step. Sort the parameters again if any of them or any state is new."""
        fresh = self._fingerprint is not None and self._fingerprint.holds(groups, state, verify_state)
        fresh = fresh and self._thresholds.fits(groups)
        if fresh and self._torch_members:
            fresh = self._torch.fits(groups)
        if not fresh:
            self._sort(groups, state)
        elif self._thresholds.any:
            self._thresholds.begin(state)
        if self._triton is not None and not self._triton.stage(groups, request, verify_state):
            self._sort(groups, state)
            fresh = False
            if self._triton is not None and not self._triton.stage(groups, request, verify_state):
                raise RuntimeError("lwadamw.AdamW: parameters or state are being replaced while step() runs.")
        created = bool(self._torch_members) and self._torch.prepare(self._torch_members, groups, state, fresh)
        if (created or not fresh) and self._fingerprint is not None:
            self._fingerprint.follow_state(state)

    def _sort(self, groups: ParamGroups, state: State, idle: bool = True) -> None:
        """Give every parameter to a backend.

        Args:
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.
            idle: leave out parameters of the Triton backend that have neither a gradient nor state. False: leave them
                out only if they do not require a gradient either.
        """
        if capturing() or any(map(capturing, {local(p).device for group in groups for p in group["params"]})):
            raise RuntimeError(
                "lwadamw.AdamW: parameters, state or groups are new to the optimizer, so this step cannot be captured in a "
                "CUDA graph. Take one uncaptured step first, and change nothing between it and the capture."
            )
        self._naming.follow(groups)
        members = list(members_of(groups))
        self._shards.look(members)
        for m in members:
            if state.get(m.param):  # ZeroRedundancyOptimizer puts into the state what `state_dict()` has returned
                state[m.param].update(from_saved(state[m.param], m.param))
            check_state(m, state.get(m.param, {}))
        check_layouts(members, state)
        for i, group in enumerate(groups):
            check_options(group, f"group {i}: ")
        for_triton = [m for m in members if use_triton(m, state.get(m.param, {}), self._backend)]
        if self._triton is not None:
            self._triton.follow()  # the new tables are made of the step counts in the former ones
        self._skipped = self.skipped
        self.keep_captures(self)
        self._forget()
        for m in members:
            if state.get(m.param):
                settle(m.param, state[m.param])
        chosen = {id(m.param) for m in for_triton}
        self._torch_members = [m for m in members if id(m.param) not in chosen]
        self._members = {id(m.param): m for m in members}
        self._looks = {id(m.param): look(m.param) for m in self._torch_members}
        for m in members:
            split = self._shards.split_of(m)
            if split.groups and split not in self._shards.declared:
                self._splits.setdefault(split, []).append(m)
        self._thresholds.sort(members, groups, state)
        self._thresholds.begin(state)
        if for_triton:
            from ..tables.triton_backend import TritonBackend

            self._triton = TritonBackend(
                for_triton,
                groups,
                state,
                self._skipped,
                idle=idle,
                shards=self._shards,
                thresholds=self._thresholds,
            )
        # The plans of the Triton backend look at their parameters themselves.
        self._fingerprint = Fingerprint(groups, [m.param for m in self._torch_members])

    def keep_captures(self, former: Engine) -> None:
        """Keep the tables that CUDA graphs may still read.

        Args:
            former: an engine of the same optimizer. It may be this one.
        """
        if former is not self:
            self._captured += former._captured
        if former._triton is not None and former._triton.has_captures:
            self._captured.append(former._triton)

    def norm_names(self, state: State) -> list[str]:
        """Return the names that `norm_sums` returns, without computing any sum.

        Args:
            state: the optimizer's state by parameter.
        """
        stepped = [] if self._triton is None else list(self._triton.members)
        stepped += [m for m in self._torch_members if state.get(m.param)]
        there = sorted((m for m in stepped if not is_elsewhere(m.param)), key=lambda m: m.order)
        return [name for m in there for name in m.segment_names()]

    def norm_sums(self, state: State, *, whole: Call | None) -> tuple[list[str], Tensor]:
        """Return the sums of the last step for all segments that have taken a step.

        Args:
            state: the optimizer's state by parameter.
            whole: what the user has called to add up the sums of all processes that hold parts of a parameter, which is
                collective. None: the sums of this process.

        Returns:
            The names of the n segments, and their sums, float64[n, 4] on the device of the first segment. The columns are
            those of `AdamW.norm_sums`.
        """
        together = [m for m in self._torch_members if id(m.param) not in self._released]
        torch_sums = self._torch.norm_sums(together, state)
        for member, torch_backend in self._released.values():
            torch_sums += torch_backend.norm_sums([member], state)
        tables: list[Table] = [] if self._triton is None else self._triton.norm_sums()
        tables += [([m], rows) for m, rows in torch_sums]
        if whole is not None:
            members = [m for some in self._splits.values() for m in some]
            return whole_sums(tables, members, state, self._shards, whole)
        rows, sums = join_sums(tables)
        return [name for _, name in rows], sums
