"""Checks of parameters, gradients and state that are made before a step writes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import decay
from .members import Member, is_fake, is_sharded, local
from .storage import ARRAYS, CODES, SCALES, scale_shape

_ANEW = "Delete optimizer.state[p] to start its moments at zero"


def check_state(member: Member, state: Mapping[str, Any]) -> None:
    """Raise an error if the state of a parameter does not fit the parameter.

    Args:
        member: the parameter.
        state: its state.

    Raises:
        RuntimeError: a tensor of the state has another shape or another device than the parameter, an 8-bit moment has no
            fitting scales or is not possible under amsgrad, or the huber threshold is not float32[] or the parameter is
            sharded.
    """
    p = member.param
    for key in ARRAYS:
        tensor = state.get(key)
        if tensor is None:
            continue
        if tensor.shape != p.shape:
            raise RuntimeError(
                f"{key} of {member.name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(p.shape)}. {_ANEW}, or load "
                "a checkpoint of this model."
            )
        if tensor.device != p.device:
            raise RuntimeError(
                f"{key} of {member.name!r} {tuple(p.shape)} is on {tensor.device}, the parameter on {p.device}. "
                f"Move the optimizer state back before stepping: optimizer.state[p][{key!r}] = "
                f"optimizer.state[p][{key!r}].to(p.device)."
            )
    if decay.is_huber(member.group):
        _check_threshold(member, state)
    if member.group["amsgrad"] and "exp_avg_sq" in state and state["exp_avg_sq"].dtype in CODES:
        raise RuntimeError(
            f"exp_avg_sq of {member.name!r} {tuple(p.shape)} is kept in 8 bits, and amsgrad=True would keep its maximum, which "
            "8 bits cannot. Set the group's exp_avg_sq_dtype to torch.bfloat16 or torch.float32 and call "
            "optimizer.convert_state(), or set amsgrad=False."
        )
    for key, scales in SCALES.items():
        if key in state and state[key].dtype in CODES:
            shape = tuple(state[scales].shape) if scales in state else "none"
            if shape != scale_shape(p):
                raise RuntimeError(
                    f"{scales} of {member.name!r} {tuple(p.shape)} has shape {shape}, and its 8-bit {key} needs "
                    f"{scale_shape(p)}. {_ANEW}, or load {key} and {scales} from the same checkpoint."
                )


def _check_threshold(member: Member, state: Mapping[str, Any]) -> None:
    p, threshold = member.param, state.get(decay.THRESHOLD)
    if is_sharded(p):
        raise RuntimeError(
            f"decay='huber' of {member.name!r} {tuple(p.shape)}, of which this process holds {tuple(local(p).shape)}: the "
            "threshold is the mean over the whole parameter, which no process can compute alone. Put the parameter into a "
            "group with decay='coupled'."
        )
    if threshold is None or (threshold.shape, threshold.dtype, threshold.device) == ((), torch.float32, p.device):
        return
    raise RuntimeError(
        f"{decay.THRESHOLD} of {member.name!r} {tuple(p.shape)} is {threshold.dtype}{list(threshold.shape)} on "
        f"{threshold.device}, and has to be torch.float32[] on {p.device}. To compute it again from the weights: "
        f"del optimizer.state[p][{decay.THRESHOLD!r}]."
    )


def check_gradient(member: Member, grad: Tensor) -> None:
    """Raise an error if a gradient is sparse.

    Args:
        member: the parameter.
        grad: its gradient.

    Raises:
        RuntimeError: the gradient does not have a strided layout.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"AdamW does not support sparse gradients: the gradient of {member.name!r} {tuple(member.param.shape)} is "
            f"{grad.layout}. Build its module with sparse=False, or give the parameter to torch.optim.SparseAdam."
        )


def check_real(members: Sequence[Member]) -> None:
    """Raise an error if a real parameter is about to be updated under torch's FakeTensorMode, which gives it fake state.

    Args:
        members: the parameters.

    Raises:
        RuntimeError: the mode is active and a parameter is a real tensor.
    """
    if not is_fake(torch.empty(0)):
        return
    for member in members:
        if not is_fake(local(member.param)):
            raise RuntimeError(
                f"step() under FakeTensorMode, but {member.name!r} {tuple(member.param.shape)} is a real tensor, whose state "
                "would become fake. Leave the mode before step(), or build the model under the mode too."
            )


def capturing() -> bool:
    """Return whether the current CUDA stream is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def check_capturable(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise an error if a group was not built for capture in a CUDA graph. torch's optimizers do the same.

    Args:
        groups: an optimizer's `param_groups`.

    Raises:
        RuntimeError: a group has capturable=False.
    """
    for i, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, but group {i} has capturable=False. "
                "Build the optimizer with capturable=True."
            )
