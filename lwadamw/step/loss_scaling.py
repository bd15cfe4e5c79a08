"""Loss scaling of released gradients: which torch.amp.GradScaler scaled the loss of a running backward, and what it hears.

A program never tells the optimizer about its scaler before `scaler.step(optimizer)`, and released gradients are gone by
then. So two methods of every scaler class are wrapped while gradients are released:

- `scale` marks its result. When backward comes to the marked tensor, which is before it comes to any parameter, the mark
  notes that this scaler has scaled this backward.
- `_unscale_grads_`, which looks for infs in the gradients of an optimizer, also reports the infs that were found in
  gradients that are gone.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..state.members import Member, is_sharded, local
from ..state.transfer import moved
from ..tables.request import Request
from ..tables.stream_order import StreamOrder


class _Scaled(NamedTuple):
    """What is known of a backward whose loss was scaled: by which scaler (None: by several), and by how much, float32[]."""

    scaler: GradScaler | None
    scale: Tensor


# Scaled backwards by autograd's number for them. Numbers are never used twice. An entry stays when its backward ends,
# because backward may end with an exception. So only the newest entries are kept.
_backwards: OrderedDict[int, _Scaled] = OrderedDict()
_KEPT = 64
_open: weakref.WeakValueDictionary[int, LossScaling] = weakref.WeakValueDictionary()  # by id() of the optimizer
_wrapped: list[tuple[type, str, Any, Any]] = []  # class, method name, original, wrapper


class LossScaling:
    """Unscales the gradients of one optimizer while they are released, and collects for scalers where infs were found.

    Args:
        optimizer: the optimizer whose gradients are released.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._key = id(optimizer)
        # What `scaler.step` has not asked for yet: float32[] by device, by scaler.
        self._found: weakref.WeakKeyDictionary[GradScaler, dict[torch.device, Tensor]] = weakref.WeakKeyDictionary()
        self._buffers: dict[torch.device, tuple[Tensor, Tensor, StreamOrder]] = {}
        _open[self._key] = self
        _wrap_all()

    def close(self) -> None:
        """End this object's work. A second call does nothing."""
        if _open.get(self._key) is self:
            del _open[self._key]
        if not _open:
            _unwrap_all()

    def request_for(self, member: Member, request: Request) -> Request:
        """Return what the step of one parameter has to do because of loss scaling. The host does not wait for the device.

        Args:
            member: the parameter, with its complete gradient.
            request: what the step does besides the update, without the scaler of the running backward.

        Returns:
            `request` itself if no scaler has scaled the running backward. Else a request that unscales the gradient, and
            skips the step if the gradient is not finite.

        Raises:
            RuntimeError: several scalers have scaled this backward, or other processes hold parts of the parameter.
        """
        scaled = _backwards.get(torch._C._current_graph_task_id())
        return request if scaled is None else self._scaled_request(member, request, scaled)

    @torch.no_grad()
    def _scaled_request(self, member: Member, request: Request, scaled: _Scaled) -> Request:
        what = f"{member.name!r} {tuple(member.param.shape)}"
        if scaled.scaler is None:
            raise RuntimeError(
                f"release_gradients(): several GradScalers have scaled the loss whose backward gives {what} its gradient. "
                "Scale the sum of the losses with one GradScaler."
            )
        if is_sharded(member.param):
            raise RuntimeError(
                f"release_gradients() with a GradScaler: {what} is sharded over processes, and this process does not see "
                "an inf in another shard. Train in bfloat16 without a GradScaler, or do not call release_gradients()."
            )
        grad = local(member.param.grad.detach())  # type: ignore[union-attr]
        found = self._look(grad)
        totals = self._found.setdefault(scaled.scaler, {})
        if grad.device in totals:
            totals[grad.device] += found
        else:
            totals[grad.device] = found.clone()
        scale = moved(scaled.scale, grad.device, torch.float32)
        if request.grad_scale is not None:
            scale = scale * moved(request.grad_scale, grad.device)
        if request.found_inf is not None:
            found = found + moved(request.found_inf, grad.device, torch.float32)
        return request._replace(grad_scale=scale, found_inf=found)

    def _look(self, grad: Tensor) -> Tensor:
        """Return float32[] on the device of a gradient, not 0 if the gradient has an inf or a NaN. The next call reuses it."""
        if grad.device not in self._buffers:
            zero = torch.zeros((), dtype=torch.float32, device=grad.device)
            one, order = torch.ones_like(zero), StreamOrder(grad.device)
            order.add((zero, one))
            self._buffers[grad.device] = (zero, one, order)
        found, one, order = self._buffers[grad.device]
        order.follow()  # a step on another stream may still have to read what was found for it
        found.zero_()
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        # The operator that GradScaler looks with. It reads the gradient once and needs no memory.
        torch._amp_foreach_non_finite_check_and_unscale_([real], found, one)
        return found

    def report(self, scaler: GradScaler, found: dict[torch.device, Tensor]) -> None:
        """Add to what a scaler has found in gradients, and forget it here.

        Args:
            scaler: the scaler that asks.
            found: float32[] by device, changed in place.
        """
        for device, total in self._found.pop(scaler, {}).items():
            found[device] = found[device] + total if device in found else total


def _note(scaled: _Scaled, _: Tensor) -> None:
    """Note that the running backward was scaled. Autograd calls this with the gradient of a scaled tensor."""
    task = torch._C._current_graph_task_id()
    other = _backwards.get(task, scaled)
    _backwards[task] = scaled if other.scaler is scaled.scaler else scaled._replace(scaler=None)
    while len(_backwards) > _KEPT:
        _backwards.popitem(last=False)


def _mark(scaler: GradScaler, output: Any) -> Any:
    """Mark a scaled tensor, or all tensors of an iterable as `scale` returns it."""
    if isinstance(output, Tensor):
        scale = getattr(scaler, "_scale", None)
        if output.requires_grad and scale is not None:
            # The scale is copied, because `update` may change it before backward runs.
            note = functools.partial(_note, _Scaled(scaler, scale.detach().clone()))
            output.register_hook(note)  # type: ignore[no-untyped-call]
        return output
    if isinstance(output, (list, tuple)):
        for each in output:
            _mark(scaler, each)
        return output
    return (_mark(scaler, each) for each in output) if isinstance(output, Iterable) else output


def _scale(original: Callable[..., Any], scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
    output = original(scaler, *args, **kwargs)
    return _mark(scaler, output) if _open and scaler.is_enabled() else output


def _unscale(original: Callable[..., Any], scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(scaler, optimizer, *args, **kwargs)
    scaling = _open.get(id(optimizer))
    if scaling is not None:
        scaling.report(scaler, found)
    return found


_AROUND: dict[str, Callable[..., Any]] = {"scale": _scale, "_unscale_grads_": _unscale}


def _wrap_all() -> None:
    """Wrap the methods of all scaler classes, unless they are wrapped already."""
    if _wrapped:
        return

    def init_subclass(cls: Any, /, **kwargs: Any) -> None:
        super(GradScaler, cls).__init_subclass__(**kwargs)
        _wrap(cls)

    classes = [GradScaler]
    for cls in classes:
        classes += cls.__subclasses__()
    for cls in dict.fromkeys(classes):
        _wrap(cls)
    if "__init_subclass__" not in vars(GradScaler):
        wrapper: Any = classmethod(init_subclass)
        GradScaler.__init_subclass__ = wrapper  # type: ignore[method-assign]
        _wrapped.append((GradScaler, "__init_subclass__", None, wrapper))


def _wrap(cls: type) -> None:
    """Wrap the methods that a class itself defines."""
    for name, around in _AROUND.items():
        original = cls.__dict__.get(name)
        if original is not None:
            wrapper = _around(original, around)
            setattr(cls, name, wrapper)
            _wrapped.append((cls, name, original, wrapper))


def _around(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return wrapper


def _unwrap_all() -> None:
    """Give all scaler classes their methods back. A method that somebody else has wrapped since then stays as it is."""
    for cls, name, original, wrapper in reversed(_wrapped):
        if cls.__dict__.get(name) is not wrapper:
            continue
        if original is None:
            delattr(cls, name)
        else:
            setattr(cls, name, original)
    _wrapped.clear()
