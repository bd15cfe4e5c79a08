"""Engine: one step, from an optimizer's groups to the backends that update them, and what the step measured.

Holds nothing that cannot be rebuilt from groups and state, so an optimizer can be copied, pickled or rearranged by a
framework at any time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import Member, capturing, check_capturable, is_sharded, local, use_triton
from .compare import same
from .torch_backend import TorchBackend

if TYPE_CHECKING:
    from .triton_backend import TritonBackend

Groups = Sequence[dict[str, Any]]
State = Mapping[Any, dict[str, Any]]


class Engine:
    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._forget()

    def _forget(self) -> None:
        self._params: list[list[Tensor]] | None = None  # of each group
        self._referents: list[Any] = []  # every object in every parameter's state
        self._triton: TritonBackend | None = None
        self._torch = TorchBackend()
        self._torch_members: list[Member] = []
        self.grad_norm: Tensor | None = None

    def uses_triton(self, groups: Groups) -> bool:
        """Whether any parameter is the Triton backend's."""
        return any(use_triton(m, {}, self._backend) for m in members_of(groups))

    def step(
        self,
        groups: Groups,
        state: State,
        *,
        verify_state: bool,
        max_grad_norm: float | None,
        norms: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take one step. What is wrong with parameters, gradients or state is raised before anything is written.

        verify_state: somebody else has had access to `state` and may have replaced or moved any tensor in it
        """
        if capturing():
            check_capturable(groups)
        # State made in inference mode could not be updated outside of it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self._prepare(groups, state, verify_state, max_grad_norm, grad_scale, found_inf)
            fused, others = self._triton, self._torch
            if max_grad_norm is None:
                if fused is not None:
                    fused.run(clip=False, norms=norms)
                if others.buckets:
                    others.run(factor=None, grad_scale=grad_scale, found_inf=found_inf)
                return
            totals = ([] if fused is None else fused.sum_gradients()) + others.sum_gradients()
            if fused is not None:
                if len(totals) > 1:
                    fused.set_total(totals)
                fused.run(clip=True, norms=norms)
                self.grad_norm = fused.grad_norm
            if others.buckets:
                norm, factor, found_inf = _clip_factor(totals, max_grad_norm, grad_scale, found_inf)
                others.run(factor=factor, grad_scale=None, found_inf=found_inf)
                if fused is None:
                    self.grad_norm = norm

    def _prepare(
        self,
        groups: Groups,
        state: State,
        verify_state: bool,
        max_grad_norm: float | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        fresh = same([group["params"] for group in groups], self._params) and (
            not verify_state or same(gc.get_referents(*state.values()), self._referents)
        )
        if not fresh:
            self._sort(groups, state)
        if self._triton is not None:
            arguments = (groups, verify_state, max_grad_norm or 0.0, grad_scale, found_inf)
            if not self._triton.stage(*arguments):
                self._sort(groups, state)
                fresh = False
                if not self._triton.stage(*arguments):
                    raise RuntimeError("lwadamw.AdamW: parameters or state are being replaced while step() runs.")
        created = bool(self._torch_members) and self._torch.prepare(self._torch_members, groups, state, fresh)
        if created or not fresh:
            self._referents = gc.get_referents(*state.values())

    def _sort(self, groups: Groups, state: State) -> None:
        """Give every parameter to a backend."""
        if capturing():
            raise RuntimeError(
                "lwadamw.AdamW: parameters, state or groups are new to the optimizer, so this step cannot be captured in a "
                "CUDA graph. Take one uncaptured step first, and change nothing between it and the capture."
            )
        self._forget()
        members = list(members_of(groups))
        for_triton = [m for m in members if use_triton(m, state.get(m.param, {}), self._backend)]
        chosen = {id(m.param) for m in for_triton}
        self._torch_members = [m for m in members if id(m.param) not in chosen]
        if for_triton:
            from .triton_backend import TritonBackend

            self._triton = TritonBackend(for_triton, groups, state)
        self._params = [list(group["params"]) for group in groups]

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
        pieces += [(m.order, m.name, sums) for m, sums in self._torch.norm_sums(self._torch_members, state)]
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


def members_of(groups: Groups) -> Iterator[Member]:
    order = 0
    for group_index, group in enumerate(groups):
        names = group.get("param_names")
        segments = group.get("segments") or {}
        for i, p in enumerate(group["params"]):
            name = names[i] if names else f"{group_index}.{i}"
            yield Member(p, name, group, group_index, order, _segment_sizes(p, segments.get(name, ())))
            order += 1


def _segment_sizes(p: Tensor, rows: Sequence[int]) -> tuple[int, ...]:
    """Elements per segment. A shard or another memory order has no such runs of elements: it stays whole."""
    if not rows or local(p) is not p or not p.is_contiguous() or sum(rows) != p.shape[0]:
        return ()
    return tuple(n * (p.numel() // p.shape[0]) for n in rows)


def _clip_factor(
    totals: Sequence[Tensor], max_grad_norm: float, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(global norm, factor of the gradients, 1 if the step must not happen), all on the device of the last total."""
    device = totals[-1].device
    squares = torch.stack([t.to(device, non_blocking=True).reshape(()) for t in totals]).sum()
    scale = torch.ones_like(squares) if grad_scale is None else grad_scale.to(device, torch.float64, non_blocking=True)
    norm = squares.sqrt() / scale
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / scale
    stop = norm.isfinite().logical_not().float()
    if found_inf is not None:
        stop = torch.maximum(stop, found_inf.to(device, torch.float32, non_blocking=True).reshape(()))
    return norm.float(), factor, stop
