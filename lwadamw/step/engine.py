"""Engine: one step, from an optimizer's groups to the backends that update them, and what the step measured.

Holds nothing that cannot be rebuilt from groups and state, so an optimizer can be copied, pickled or rearranged by a
framework at any time.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state.checks import capturing, check_capturable
from ..state.identity import same
from ..state.members import Member, ParamGroups, is_sharded, members_of
from ..tables.request import Request
from .backends import use_triton
from .nonfinite import Watch
from .torch_backend import TorchBackend

if TYPE_CHECKING:
    from ..tables.triton_backend import TritonBackend

State = Mapping[Any, dict[str, Any]]


class Engine:
    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._skipped: Tensor | None = None  # by backends that are not there any more, or by torch's
        self._watch = Watch()
        self._forget()

    def _forget(self) -> None:
        self._params: list[list[Tensor]] | None = None  # of each group
        self._referents: list[Any] = []  # every object in every parameter's state
        self._triton: TritonBackend | None = None
        self._torch = TorchBackend()
        self._torch_members: list[Member] = []
        self._torch_by_id: dict[int, Member] = {}
        self._alone: dict[int, tuple[Member, TorchBackend]] = {}  # of the parameters that have taken a step alone
        self.grad_norm: Tensor | None = None

    def uses_triton(self, groups: ParamGroups) -> bool:
        """Whether any parameter is the Triton backend's."""
        return any(use_triton(m, {}, self._backend) for m in members_of(groups))

    @property
    def skipped(self) -> Tensor | None:
        """int64[], steps that no parameter took; None: none that could have been skipped has been asked for."""
        counter = None if self._triton is None else self._triton.skipped
        return self._skipped if counter is None else counter

    def step(self, groups: ParamGroups, state: State, request: Request, *, verify_state: bool) -> None:
        """Take one step. What is wrong with parameters, gradients or state is raised before anything is written.

        verify_state: somebody else has had access to `state` and may have replaced or moved any tensor in it
        """
        if capturing():
            check_capturable(groups)
        else:
            self._watch.check()
        # State made in inference mode could not be updated outside of it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._prepare(groups, state, request, verify_state)
            if request.max_grad_norm is None:
                self._run(request)
            else:
                self._run_clipped(request)
            # A scaler that has found it first has its own way with it.
            watched = request.nonfinite == "raise" and request.max_grad_norm is not None
            if watched and request.found_inf is None and self.grad_norm is not None and not capturing():
                self._watch.look(self.grad_norm)

    def _run(self, request: Request) -> None:
        if self._triton is not None:
            self._triton.run(clip=False, norms=request.norms)
        if self._torch.buckets:
            self._torch.run(
                factor=None, grad_scale=request.grad_scale, found_inf=request.found_inf, norms=request.norms
            )
            if self._triton is None and request.found_inf is not None:
                self._count(request.found_inf)

    def _run_clipped(self, request: Request) -> None:
        triton_backend, torch_backend = self._triton, self._torch
        torch_totals = torch_backend.sum_gradients()
        totals = ([] if triton_backend is None else triton_backend.sum_gradients()) + torch_totals
        if triton_backend is not None:
            triton_backend.share_totals(torch_totals)
            triton_backend.run(clip=True, norms=request.norms)
            self.grad_norm = triton_backend.grad_norm
        if torch_backend.buckets:
            norm, factor, stop = _clip_factor(totals, request)
            torch_backend.run(factor=factor, grad_scale=None, found_inf=stop, norms=request.norms)
            if triton_backend is None:
                self.grad_norm = norm
                if stop is not None:
                    self._count(stop)

    def _count(self, stop: Tensor) -> None:
        if self._skipped is None:
            self._skipped = torch.zeros((), dtype=torch.int64, device=stop.device)
        self._skipped += (stop.reshape(()) != 0).to(self._skipped.device)

    def step_alone(self, groups: ParamGroups, state: State, p: Tensor, *, verify_state: bool, norms: bool) -> None:
        """Take the step of one parameter, whose gradient is complete while others' are not."""
        if not same([group["params"] for group in groups], self._params):
            self._sort(groups, state, idle=False)
        member = self._torch_by_id.get(id(p))
        if member is None:
            for _ in range(2):
                if self._triton is not None and self._triton.run_one(groups, p, norms, verify_state):
                    return
                self._sort(groups, state, idle=False)
            raise RuntimeError("lwadamw.AdamW: parameters or state are being replaced while backward() runs.")
        _, alone = self._alone.setdefault(id(p), (member, TorchBackend()))
        alone.prepare([member], groups, state, fresh=False)
        alone.run(factor=None, grad_scale=None, found_inf=None, norms=norms)
        if norms:
            alone.measure()

    def _prepare(self, groups: ParamGroups, state: State, request: Request, verify_state: bool) -> None:
        fresh = same([group["params"] for group in groups], self._params) and (
            not verify_state or same(gc.get_referents(*state.values()), self._referents)
        )
        if not fresh:
            self._sort(groups, state)
        if self._triton is not None and not self._triton.stage(groups, request, verify_state):
            self._sort(groups, state)
            fresh = False
            if self._triton is not None and not self._triton.stage(groups, request, verify_state):
                raise RuntimeError("lwadamw.AdamW: parameters or state are being replaced while step() runs.")
        created = bool(self._torch_members) and self._torch.prepare(self._torch_members, groups, state, fresh)
        if created or not fresh:
            self._referents = gc.get_referents(*state.values())

    def _sort(self, groups: ParamGroups, state: State, idle: bool = True) -> None:
        """Give every parameter to a backend; `idle`: leave those out that have neither gradient nor state yet."""
        if capturing():
            raise RuntimeError(
                "lwadamw.AdamW: parameters, state or groups are new to the optimizer, so this step cannot be captured in a "
                "CUDA graph. Take one uncaptured step first, and change nothing between it and the capture."
            )
        self._skipped = self.skipped
        self._forget()
        members = list(members_of(groups))
        for_triton = [m for m in members if use_triton(m, state.get(m.param, {}), self._backend)]
        chosen = {id(m.param) for m in for_triton}
        self._torch_members = [m for m in members if id(m.param) not in chosen]
        self._torch_by_id = {id(m.param): m for m in self._torch_members}
        if for_triton:
            from ..tables.triton_backend import TritonBackend

            self._triton = TritonBackend(for_triton, groups, state, self._skipped, idle=idle)
        self._params = [list(group["params"]) for group in groups]

    def norm_names(self, state: State) -> list[str]:
        """The names that `norm_sums` has, without the sums."""
        rows = [] if self._triton is None else [(m.order, m.segment_names()) for m in self._triton.members]
        rows += [(m.order, [m.name]) for m in self._torch_members if state.get(m.param)]
        return [name for _, names in sorted(rows, key=lambda row: row[0]) for name in names]

    def norm_sums(self, state: State) -> tuple[list[str], Tensor]:
        """Names of all segments that have been updated, and their sums, float64[n, 4] on the first one's device."""
        pieces: list[tuple[int, str, Tensor]] = []
        tables = [] if self._triton is None else self._triton.norm_sums()
        if len(tables) == 1 and not self._torch_members:
            ((members, sums),) = tables
            return [name for m in members for name in m.segment_names()], sums
        for members, sums in tables:
            rows = iter(sums.unbind())
            pieces += [(m.order, name, next(rows)) for m in members for name in m.segment_names()]
        by_torch = [self._torch.norm_sums([m for m in self._torch_members if id(m.param) not in self._alone], state)]
        by_torch += [alone.norm_sums([m], state) for m, alone in self._alone.values()]
        pieces += [(m.order, m.name, sums) for found in by_torch for m, sums in found]
        if not pieces:
            return [], torch.empty(0, 4, dtype=torch.float64)
        pieces.sort(key=lambda piece: piece[0])
        device = pieces[0][2].device
        return [name for _, name, _ in pieces], torch.stack([t.to(device, non_blocking=True) for _, _, t in pieces])

    def sharded_member(self) -> Member | None:
        """Some parameter of which this process holds a part only, if there is one."""
        if self._triton is not None and self._triton.sharded is not None:
            return self._triton.sharded
        return next((m for m in self._torch_members if is_sharded(m.param)), None)


def _clip_factor(totals: Sequence[Tensor], request: Request) -> tuple[Tensor, Tensor, Tensor | None]:
    """(global norm, factor of the gradients, 1 if the step must not happen), all on the device of the last total."""
    device = totals[-1].device
    squares = torch.stack([t.to(device, non_blocking=True).reshape(()) for t in totals]).sum()
    grad_scale, found_inf = request.grad_scale, request.found_inf
    scale = torch.ones_like(squares) if grad_scale is None else grad_scale.to(device, torch.float64, non_blocking=True)
    norm = squares.sqrt() / scale
    factor = ((request.max_grad_norm or 0.0) / (norm + 1e-6)).clamp(max=1.0) / scale
    stop = None if request.nonfinite == "pass" else norm.isfinite().logical_not().float()
    if found_inf is not None:
        found = found_inf.to(device, torch.float32, non_blocking=True).reshape(())
        stop = found if stop is None else torch.maximum(stop, found)
    return norm.float(), factor, stop
