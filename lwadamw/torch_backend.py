"""torch backend: torch's own functional AdamW, fed with effective values.

Serves the CPU, complex and low-precision parameters, and whoever asks for foreach, differentiable or fused=False.
Parameters whose effective values agree share one call, however many groups they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .backends import MOMENTS, Member, check_gradient, check_state, effective, local

_FUSABLE = (torch.float32, torch.float64)
_FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")


@dataclass
class Bucket:
    """Parameters that one call of the functional AdamW updates."""

    options: dict[str, Any]  # its keyword arguments
    members: list[Member] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    factor: Tensor | None = None  # what the step multiplied the gradients with
    skipped: Tensor | bool = False  # nonzero: the step left them alone


class TorchBackend:
    def __init__(self) -> None:
        self.buckets: list[Bucket] = []

    def prepare(self, members: Iterable[Member], state: Any) -> None:
        """Collect what this step updates, creating missing state.

        Raises:
            RuntimeError: sparse gradient, or state that does not fit its parameter; nothing has been written.
        """
        keys: dict[tuple[int, bool], tuple[Any, ...]] = {}
        buckets: dict[tuple[Any, ...], Bucket] = {}
        for m in members:
            grad = m.param.grad
            if grad is None:
                continue
            check_gradient(m, grad)
            p_state = state[m.param]
            check_state(m, p_state)
            fuses = _fuses_unasked(m, grad, p_state)
            key = keys.get((m.group_index, fuses))
            if key is None:
                flags = (fuses or m.group[flag] if flag == "fused" else m.group[flag] for flag in _FLAGS)
                key = keys[m.group_index, fuses] = (*effective(m.group), *m.group["betas"], *flags)
            bucket = buckets.get(key)
            if bucket is None:
                names = ("lr", "weight_decay", "eps", "beta1", "beta2", *_FLAGS)
                bucket = buckets[key] = Bucket(dict(zip(names, key, strict=True)))
            bucket.members.append(m)
            bucket.states.append(p_state)
            bucket.grads.append(grad)
        for bucket in buckets.values():
            for m, p_state in zip(bucket.members, bucket.states, strict=True):
                _complete(p_state, m, on_device=bool(bucket.options["capturable"] or bucket.options["fused"]))
        self.buckets = list(buckets.values())

    def sum_gradients(self) -> list[Tensor]:
        """Sums of squares of all gradients, float64[], before unscaling; over all processes where they are DTensors."""
        norms: dict[tuple[torch.device, type], list[Tensor]] = {}
        for grad in (grad for bucket in self.buckets for grad in bucket.grads):
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            # In its own precision a 16-bit norm would be wrong in the third digit.
            dtype = torch.float32 if real.dtype.itemsize < 4 else None
            norm = torch.linalg.vector_norm(real, dtype=dtype)
            norms.setdefault((norm.device, type(norm)), []).append(norm)
        totals = [torch.linalg.vector_norm(torch.stack([n.double() for n in same])) for same in norms.values()]
        return [(t.full_tensor() if hasattr(t, "full_tensor") else t).square() for t in totals]

    def run(self, *, factor: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take the step.

        factor: multiplies the gradients, scaled copies of which are updated with; None for no clipping
        grad_scale: divides the gradients; None if factor already does
        found_inf: 1 to leave everything alone. The fused implementation reads it on the device, the others here.
        """
        for bucket in self.buckets:
            options, fused = bucket.options, bool(bucket.options["fused"])
            params = [m.param for m in bucket.members]
            grads, bucket.grads = bucket.grads, []  # a gradient kept for the norms would keep its memory
            bucket.factor = 1 / grad_scale if grad_scale is not None else factor
            if found_inf is not None:
                bucket.skipped = found_inf if fused else bool(found_inf)
                if bucket.skipped is True:
                    continue
            with torch.set_grad_enabled(options["differentiable"]):
                if bucket.factor is not None and not (fused and grad_scale is not None):
                    scaled = torch._foreach_mul(grads, bucket.factor.to(params[0].device, non_blocking=True))
                    grads = [s.to(g.dtype) for s, g in zip(scaled, grads, strict=True)]  # 0-d ones were promoted
                adamw(
                    params,
                    grads,
                    [s["exp_avg"] for s in bucket.states],
                    [s["exp_avg_sq"] for s in bucket.states],
                    [s["max_exp_avg_sq"] for s in bucket.states] if options["amsgrad"] else [],
                    [s["step"] for s in bucket.states],
                    has_complex=any(map(torch.is_complex, params)),
                    grad_scale=grad_scale if fused else None,
                    found_inf=found_inf if fused else None,
                    **options,
                )
            if fused and params[0].device.type == "cpu":
                # That kernel writes behind autograd's back; a backward through the old weights must still be an error.
                torch._C._increment_version(params)
            # Norms are read later, when a schedule may have moved on.
            for name in ("lr", "beta1", "beta2", "weight_decay", "eps"):
                if isinstance(options[name], Tensor):
                    options[name] = options[name].detach().clone()

    @torch.no_grad()
    def norm_sums(self, members: Iterable[Member], state: Any) -> list[tuple[Member, Tensor]]:
        """(parameter, float64[4] of its statistics) of the last step, for every parameter that has taken one before.

        Reconstructed from weights and state. The gradient counts as NaN where it has been cleared since.
        """
        done = {
            id(m.param): _member_sums(bucket, m, s)
            for bucket in self.buckets
            for m, s in zip(bucket.members, bucket.states, strict=True)
        }
        return [
            (m, done[id(m.param)] if id(m.param) in done else _resting_sums(m)) for m in members if state.get(m.param)
        ]


def _resting_sums(member: Member) -> Tensor:
    weight = _real(member.param).square().sum()
    return torch.stack([weight, *torch.zeros_like(weight).expand(3)])


def _member_sums(bucket: Bucket, member: Member, state: Mapping[str, Any]) -> Tensor:
    options = bucket.options
    p, m = _real(member.param), _real(state["exp_avg"])
    v = _real(state["max_exp_avg_sq" if options["amsgrad"] else "exp_avg_sq"])
    lr, beta1, beta2 = (_scalar(options[name], p) for name in ("lr", "beta1", "beta2"))
    decay = lr * options["weight_decay"]
    step = state["step"].to(p.device, torch.float64)
    u = m / (1 - beta1**step) / (v.sqrt() / (1 - beta2**step).sqrt() + options["eps"])
    before = (p + lr * u) / (1 - decay)
    change = -decay * before - lr * u
    grad = member.param.grad
    squares = torch.full_like(step, float("nan"))
    if grad is not None:
        factor = 1.0 if bucket.factor is None else bucket.factor
        squares = (_real(grad) * _scalar(factor, p)).square().sum()
    moved = torch.stack([change.square().sum(), squares, (before * change).sum()])
    if bucket.skipped is not False:
        skipped = torch.as_tensor(bucket.skipped, device=p.device) != 0
        moved = torch.where(skipped, torch.zeros_like(moved), moved)
    return torch.cat([p.square().sum().reshape(1), moved])


def _real(tensor: Tensor) -> Tensor:
    tensor = local(tensor.detach())
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)


def _fuses_unasked(member: Member, grad: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether torch's fused CPU kernel serves, where torch's own default would be a loop over a dozen operators.

    It takes all tensors for contiguous, without looking, and rounds 16-bit values otherwise than the loop.
    """
    p, group = member.param, member.group
    if p.device.type != "cpu" or p.dtype not in _FUSABLE or local(p) is not p:
        return False
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"] or group["capturable"]:
        return False
    hyperparameters = (group["lr"], group["eps"], group["weight_decay"], *group["betas"])
    if any(isinstance(value, Tensor) for value in hyperparameters):
        return False
    tensors = [p, grad, *[state[key] for key in MOMENTS if key in state]]
    return all(t.dtype == p.dtype and t.is_contiguous() for t in tensors)


def _complete(state: dict[str, Any], member: Member, on_device: bool) -> None:
    """Create what is missing of a parameter's state, with `step` where torch's implementation wants it."""
    p, group = member.param, member.group
    step = state.get("step", 0.0)
    if not isinstance(step, Tensor) or (not on_device and step.device.type != "cpu"):
        dtype = torch.float32 if on_device else torch.get_default_dtype()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state["step"] = torch.tensor(float(step), dtype=dtype, device=p.device if on_device else "cpu")
    elif on_device and step.device != p.device:
        state["step"] = step.to(p.device, torch.float32)
    for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        if key not in state:
            state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
