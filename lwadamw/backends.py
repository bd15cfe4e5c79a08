"""Which backend updates a parameter, and the effective hyperparameters both of them use."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import decay
from .storage import ARRAYS, CODES, FLOATS, MOMENTS, SCALES, scale_shape

BACKENDS: Final = (None, "triton", "torch")
WIDTH_KEYS: Final = ("width_lr_mult", "width_wd_mult", "width_eps_mult")
WARMUP: Final = "width_warmup"  # key of what schedules.py multiplies a group's learning rate with


class Member(NamedTuple):
    """A parameter where it stands in the optimizer."""

    param: Tensor
    name: str
    group: dict[str, Any]
    group_index: int
    order: int  # among all parameters of all groups
    segments: tuple[int, ...]  # elements of each segment in memory order; (): one segment

    @property
    def gradient(self) -> Tensor | None:
        return gradient_of(self.param, self.group.get("grad_attribute", "grad"))

    def segment_names(self) -> list[str]:
        return [f"{self.name}[{i}]" for i in range(len(self.segments))] or [self.name]


class Request(NamedTuple):
    """What a step is to do besides the update."""

    max_grad_norm: float | None = None
    nonfinite: str = "skip"  # what becomes of a step whose norm to clip by is not finite: "skip", "raise" or "pass"
    norms: bool = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Effective(NamedTuple):
    """Hyperparameters of a group with its width multipliers and decay law applied."""

    lr: float | Tensor
    weight_decay: float | Tensor
    eps: float | Tensor


def effective(group: Mapping[str, Any]) -> Effective:
    """What the step uses of a group: base values times width multipliers (1 where a group has none).

    weight_decay is the one that torch's law, eta lambda, would need at this lr to decay as the group's own does, so that
    1/(lr weight_decay) is tau under every law. With decay="huber" it acts so on weights below the threshold.

    >>> effective({"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8, "width_lr_mult": 0.25, "width_wd_mult": 2.0})
    Effective(lr=0.00025, weight_decay=0.2, eps=1e-08)
    """

    def scaled(key: str, multiplier: float) -> float | Tensor:
        value: float | Tensor = group[key]
        return value if multiplier == 1 else value * multiplier

    lr_mult, wd_mult, eps_mult = (group.get(key, 1.0) for key in WIDTH_KEYS)
    if WARMUP in group:
        lr_mult *= group[WARMUP]
    weight_decay = scaled("weight_decay", wd_mult)
    if "decay" in group:
        weight_decay = weight_decay * decay.per_lr(group)
    return Effective(scaled("lr", lr_mult), weight_decay, scaled("eps", eps_mult))


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors; Triton reads this once, as the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def local(tensor: Tensor) -> Tensor:
    """The tensor this process holds: a DTensor's shard, or the tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def gradient_of(p: Tensor, attribute: str) -> Tensor | None:
    """The gradient of a parameter, where its group says it is kept."""
    grad: Tensor | None = p.grad if attribute == "grad" else getattr(p, attribute, None)
    return grad


def gradients_of(params: Sequence[Tensor], attribute: str) -> list[Any]:
    """`gradient_of` of many, at the cost of a list comprehension where they are in `grad`."""
    return [p.grad for p in params] if attribute == "grad" else [getattr(p, attribute, None) for p in params]


def any_gradient(params: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether any parameter has a gradient, given by where they would be."""
    return any(grad is not None for attribute, some in params.items() for grad in gradients_of(some, attribute))


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other parts of it."""
    shard = local(tensor)
    return shard is not tensor and shard.numel() != tensor.numel()


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def triton_refusal(p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Why the Triton backend cannot update `p`, or None if it can."""
    if not has_triton():
        return "triton is not installed. Install it, or use backend='torch'"
    if group["differentiable"]:
        return "differentiable=True needs autograd through the step. Use backend='torch'"
    p = local(p)
    if p.layout != torch.strided:
        return f"its layout is {p.layout}. Use backend='torch'"
    if p.device.type == "cpu":
        if not interpreting():
            return "it is on the CPU. Move it to a GPU, use backend='torch', or set TRITON_INTERPRET=1 before Python starts"
    elif p.device.type != "cuda":
        return f"it is on {p.device}, and the kernels run on CUDA and ROCm devices. Use backend='torch'"
    elif not torch.version.hip and torch.cuda.get_device_capability(p.device) < (8, 0):
        return f"{torch.cuda.get_device_name(p.device)} is older than compute capability 8.0. Use backend='torch'"
    if p.dtype not in FLOATS:
        return f"its dtype is {p.dtype}, and the kernels compute in float32. Use backend='torch'"
    for key in MOMENTS:
        if key in state and state[key].dtype not in (*FLOATS, *CODES):
            return f"its {key} is {state[key].dtype}, and the kernels compute in float32. Use backend='torch'"
    if not is_dense(p):
        return f"its strides {tuple(p.stride())} leave gaps or overlap. Use p.contiguous() or backend='torch'"
    return None


def wants_torch(group: Mapping[str, Any]) -> bool:
    """Whether a group asks for one of torch's own implementations by its flags."""
    asks_for_loop = group["fused"] is None and group["foreach"] is not None
    return bool(group["differentiable"] or group["foreach"] or group["fused"] is False or asks_for_loop)


def use_triton(member: Member, state: Mapping[str, Any], backend: str | None) -> bool:
    """Whether the Triton backend updates this parameter.

    Raises:
        RuntimeError: backend is "triton" and it cannot.
    """
    p = member.param
    if backend == "torch" or (backend is None and (wants_torch(member.group) or local(p).device.type == "cpu")):
        return False
    refusal = triton_refusal(p, member.group, state)
    if refusal is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot update {member.name!r} {tuple(p.shape)}: {refusal}.")
    return refusal is None


def capturing() -> bool:
    """Whether the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def check_capturable(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise a RuntimeError, as torch's optimizers do, if some group was not built for capture."""
    for i, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, but group {i} has capturable=False. "
                "Build the optimizer with capturable=True."
            )


def check_state(member: Member, state: Mapping[str, Any]) -> None:
    """Raise a RuntimeError if a state tensor has another shape than its parameter's, or lives on another device."""
    p = member.param
    for key in ARRAYS:
        tensor = state.get(key)
        if tensor is None:
            continue
        if tensor.shape != p.shape:
            raise RuntimeError(
                f"{key} of {member.name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(p.shape)}. "
                "Delete optimizer.state[p] to start its moments anew, or load a checkpoint of this model."
            )
        if tensor.device != p.device:
            raise RuntimeError(
                f"{key} of {member.name!r} {tuple(p.shape)} is on {tensor.device}, the parameter on {p.device}. "
                "Move the optimizer state back before stepping."
            )
    if decay.is_huber(member.group):
        _check_threshold(member, state)
    if member.group["amsgrad"] and "exp_avg_sq" in state and state["exp_avg_sq"].dtype in CODES:
        raise RuntimeError(
            f"exp_avg_sq of {member.name!r} {tuple(p.shape)} is kept in 8 bits, and amsgrad=True would need its maximum. Set "
            "the group's exp_avg_sq_dtype to torch.bfloat16 or torch.float32 and call convert_state(), or set amsgrad=False."
        )
    for key, scales in SCALES.items():
        if key in state and state[key].dtype in CODES:
            shape = tuple(state[scales].shape) if scales in state else "none"
            if shape != scale_shape(p):
                raise RuntimeError(
                    f"{scales} of {member.name!r} {tuple(p.shape)} has shape {shape}, and its 8-bit {key} needs "
                    f"{scale_shape(p)}. Delete optimizer.state[p] to start its moments anew, or load both from one checkpoint."
                )


def _check_threshold(member: Member, state: Mapping[str, Any]) -> None:
    p, threshold = member.param, state.get(decay.THRESHOLD)
    if is_sharded(p):
        raise RuntimeError(
            f"decay='huber' of {member.name!r} {tuple(p.shape)}, of which this process holds {tuple(local(p).shape)}: its "
            "threshold is the mean over the whole parameter. Give it a group with another decay."
        )
    if threshold is None or (threshold.shape, threshold.dtype, threshold.device) == ((), torch.float32, p.device):
        return
    raise RuntimeError(
        f"{decay.THRESHOLD} of {member.name!r} {tuple(p.shape)} is {threshold.dtype}{list(threshold.shape)} on "
        f"{threshold.device}, and has to be torch.float32[] on {p.device}. Delete it from optimizer.state[p] to start anew."
    )


def check_gradient(member: Member, grad: Tensor) -> None:
    """Raise a RuntimeError if a gradient is sparse."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"AdamW does not support sparse gradients: that of {member.name!r} {tuple(member.param.shape)} is "
            f"{grad.layout}. Build its module with sparse=False, or give it to torch.optim.SparseAdam."
        )
