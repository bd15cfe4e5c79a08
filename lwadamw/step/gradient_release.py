"""Gradient release: a parameter takes its step inside backward, when its gradient is complete, and drops the gradient."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state import keys
from ..state.checks import check_gradient, check_not_captured, check_state
from ..state.decay import is_huber
from ..state.members import Member, ParamGroups, members_of
from ..state.whole_thresholds import check_threshold_alone
from ..tables.request import Request
from .data_parallel import check_not_averaged
from .loss_scaling import LossScaling
from .nested_backward import in_nested_backward

if TYPE_CHECKING:
    from ..state.fingerprint import State
    from ..state.shards import Shards
    from .engine import Engine


class GradientRelease:
    """Handle of `AdamW.release_gradients()`.

    `remove()` ends gradient release. The handle is also a context manager that calls `remove()` at its end. The handle
    keeps the optimizer alive; the hooks on the parameters do not.

    Args:
        optimizer: the optimizer whose gradients are released.
        hooks: the hooks on its parameters.
    """

    def __init__(self, optimizer: Any, hooks: ReleaseHooks) -> None:
        self._optimizer, self._hooks = optimizer, hooks

    def remove(self) -> None:
        """Take all hooks away. From then on `AdamW.step()` takes the steps again. A second call does nothing."""
        self._hooks.remove()
        if self._optimizer._released is self._hooks:
            self._optimizer._released = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class ReleaseHooks:
    """The hooks on the parameters of one optimizer, and what has happened in them since the last `step()`.

    The hooks hold the optimizer by a weak reference. They go away together with it, so a deleted optimizer takes no more
    steps.

    Args:
        optimizer: the optimizer. A hook calls its `_step_released`.

    Raises:
        RuntimeError: as for `follow`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hooked: dict[int, tuple[Tensor, Any]] = {}  # parameter and handle, by id() of the parameter
        # Backward runs one thread for each device, and the engine's tables are shared by all of them.
        self._lock = threading.RLock()
        self._task = -1  # the backward in which the last hook fired
        self._fired = False  # whether a parameter has taken its step in backward since the last `step()`
        self._unscaled = False  # the same, in a backward that no scaler had scaled
        self._scaling = LossScaling(optimizer)
        try:
            self.follow(optimizer.param_groups)
        except Exception:
            self.remove()
            raise
        self._on_death = weakref.finalize(optimizer, _remove_all, self._hooked, self._scaling)
        self._on_death.atexit = False

    def follow(self, groups: ParamGroups, *, leave: bool = True) -> None:
        """Put a hook on every parameter that requires a gradient and has no hook yet.

        Args:
            groups: the optimizer's parameter groups.
            leave: also take the hook of every parameter away that is in no group any more.

        Raises:
            RuntimeError: another optimizer has released the gradient of one of these parameters, or a framework averages
                it over processes later.
        """
        present = {id(p): p for group in groups for p in group["params"]}
        new = [p for key, p in present.items() if key not in self._hooked and p.requires_grad]
        if new:
            check_not_averaged(new, groups)
        for p in new:
            self._check_unowned(p, groups)
        if leave:
            for key in self._hooked.keys() - present.keys():
                self._hooked.pop(key)[1].remove()
        for p in new:
            self._hooked[id(p)] = (p, p.register_post_accumulate_grad_hook(self._hook))

    def _check_unowned(self, p: Tensor, groups: ParamGroups) -> None:
        for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, ReleaseHooks) and owner is not self:
                raise RuntimeError(
                    f"release_gradients(): another optimizer has released the gradient of {_name(p, groups)!r} "
                    f"{tuple(p.shape)}. Call remove() on the handle of that optimizer first."
                )

    def remove(self) -> None:
        """Take all hooks away."""
        _remove_all(self._hooked, self._scaling)

    def _hook(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        with self._lock:
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task = task
                # The hooks of this parameter are running, so none of them is taken away here.
                self.follow(optimizer.param_groups, leave=False)
            if optimizer._step_released(p):
                p.grad = None

    def take(
        self, engine: Engine, groups: ParamGroups, state: State, p: Tensor, request: Request, verify: bool
    ) -> bool:
        """Take the step of one parameter whose gradient is complete, while backward runs.

        Args:
            engine: the optimizer's engine.
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.
            p: the parameter.
            request: what a whole step would do besides the update.
            verify: check whether the state was replaced or moved.

        Returns:
            False if the parameter is in no group any more. Then nothing has happened.

        Raises:
            RuntimeError: this parameter cannot take its step here. It has not been changed.
        """
        member = engine.released_member(groups, state, p)
        if member is None:
            return False
        _check_group(groups, member.group_index)
        if in_nested_backward():
            raise RuntimeError(
                f"release_gradients(): backward of {member.name!r} {tuple(p.shape)} runs inside another backward, as "
                "checkpointing with use_reentrant=True does. Its gradient may not be complete. Pass use_reentrant=False "
                "to torch.utils.checkpoint.checkpoint, or do not call release_gradients()."
            )
        if p.grad is not None:
            check_gradient(member, p.grad)
        told = request.found_inf is not None
        check_not_captured(member)  # before anything is allocated for the scaler
        scaled = self._scaling.request_for(member, request)
        self._unscaled |= not told and scaled is request
        engine.step_released(groups, state, member, scaled, verify_state=verify)
        self._fired = True
        return True

    def step(self, engine: Engine, groups: ParamGroups, state: State, request: Request, verify: bool) -> None:
        """Take the step of every parameter that still has a gradient, and drop these gradients.

        Args:
            engine: the optimizer's engine.
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.
            request: what the step does besides the update.
            verify: check whether the state was replaced or moved.

        Raises:
            RuntimeError: a parameter, a gradient or state cannot be used, and nothing has been written. Or a GradScaler
                calls `step()` that has not scaled the loss of some backward.
        """
        fired, unscaled, self._fired, self._unscaled = self._fired, self._unscaled, False, False
        # A scaler that has looked at no gradient assigns the int 0, which is not in the request.
        if unscaled and getattr(self._optimizer(), "found_inf", None) is not None:
            raise RuntimeError(
                "release_gradients(): a scaler takes this step, and parameters have taken their steps in a backward whose "
                "loss no known scaler had scaled. If the loss was scaled, these steps were wrong: load a checkpoint. Use a "
                "subclass of torch.amp.GradScaler, and call scaler.scale(loss) after release_gradients()."
            )
        _check_groups(groups)
        rest = [p for group in groups for p in group["params"] if p.grad is not None]
        if rest and not fired:
            engine.step(groups, state, request, verify_state=verify)
        elif rest:
            # One parameter at a time, so that the norms of the steps inside backward stay as they are.
            _check_all(groups, state)
            for p in rest:
                member = engine.released_member(groups, state, p)
                if member is not None:
                    engine.step_released(groups, state, member, request, verify_state=verify)
        if (fired or not rest) and request.found_inf is not None:
            engine.count_skipped(request.found_inf)
        for p in rest:
            p.grad = None
        self.follow(groups)


def _remove_all(hooked: dict[int, tuple[Tensor, Any]], scaling: LossScaling) -> None:
    for _, handle in hooked.values():
        handle.remove()
    hooked.clear()
    scaling.close()


def _name(p: Tensor, groups: ParamGroups) -> str:
    return next(m.name for m in members_of(groups) if m.param is p)


def _check_all(groups: ParamGroups, state: State) -> None:
    """Check every gradient and the state of its parameter, before the first of several parameters takes its step."""
    members: list[Member] = [m for m in members_of(groups) if m.param.grad is not None]
    for m in members:
        check_gradient(m, m.param.grad)  # type: ignore[arg-type]
        check_state(m, state.get(m.param, {}))


def check_releasable(groups: ParamGroups, max_grad_norm: float | None, shards: Shards) -> None:
    """Check that every parameter can take its step before the other gradients are complete.

    Args:
        groups: the optimizer's parameter groups.
        max_grad_norm: the optimizer's clipping norm, or None.
        shards: says how each parameter is split over processes.

    Raises:
        RuntimeError: `max_grad_norm` is set, a group keeps its gradients in another attribute than `grad`, or a parameter with
            huber decay is split over processes.
    """
    if max_grad_norm is not None:
        raise RuntimeError(
            f"release_gradients() with max_grad_norm={max_grad_norm}: the global norm is known only when all "
            "gradients are. Set optimizer.max_grad_norm = None."
        )
    _check_groups(groups)
    if any(map(is_huber, groups)):
        for member in members_of(groups):
            check_threshold_alone(member, shards)


def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    for i in range(len(groups)):
        _check_group(groups, i)


def _check_group(groups: Sequence[Mapping[str, Any]], i: int) -> None:
    attribute = keys.GRAD_ATTRIBUTE.of(groups[i])
    if attribute != keys.GRAD_ATTRIBUTE.default:
        raise RuntimeError(
            f"release_gradients(): group {i} has grad_attribute={attribute!r}, which autograd does not write. "
            "Build the optimizer without grad_attribute, or do not call release_gradients()."
        )
