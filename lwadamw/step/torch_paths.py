"""Paths of the torch backend: which implementation updates a parameter, and what no implementation of torch's can update.

fused      torch's fused CPU kernel, where the group leaves the implementation open
packed     float32 arithmetic on unpacked weights and moments (packed_step.py)
asked      torch's functional `adamw` with the flags of the group
loop       torch's loop over operators, where the group asks for fused=True and the kernel would ignore strides
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ..state import decay
from ..state.groups import check_numbers
from ..state.members import Member, is_dense, local
from ..state.storage import FLOATS, HALVES, MOMENTS, Storage, check_options

Path = Literal["fused", "packed", "asked", "loop"]

_EXACT: Final = (torch.float64, torch.complex64, torch.complex128)  # updated by torch only, never in float32


def leaves_open(group: Mapping[str, Any]) -> bool:
    """Return whether a group asks for no implementation of torch's.

    Args:
        group: parameter group.
    """
    return group["fused"] is None and group["foreach"] is None and not group["differentiable"]


def check_group(group: Mapping[str, Any], index: int) -> None:
    """Raise an error if torch would refuse the values of a group in the middle of a step.

    Args:
        group: parameter group.
        index: its position in `param_groups`.

    Raises:
        TypeError: a hyperparameter is neither a number nor a tensor of one element.
        ValueError: a storage option is not valid.
        RuntimeError: a hyperparameter is a tensor, and torch's foreach implementation cannot read it.
    """
    check_numbers(group, f"group {index}: ")
    # `check_state` knows whether amsgrad meets 8-bit moments, and the remedy.
    check_options({**group, "amsgrad": False}, f"group {index}: ")
    if not group["foreach"] or group["fused"] or group["capturable"]:
        return
    for key, value in {"lr": group["lr"], "betas[0]": group["betas"][0], "betas[1]": group["betas"][1]}.items():
        if isinstance(value, Tensor):
            raise RuntimeError(
                f"group {index}: {key} as a Tensor is not supported for capturable=False and foreach=True. "
                f"Set optimizer.param_groups[{index}]['foreach'] = False."
            )


def path_of(member: Member, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], storage: Storage) -> Path:
    """Choose the implementation that updates a parameter, apart from torch's fused CPU kernel.

    Args:
        member: the parameter.
        grad: its gradient.
        group: its group.
        state: its optimizer state; may be empty.
        storage: how the parameter is stored.

    Raises:
        RuntimeError: the parameter or its moments have a dtype that AdamW cannot update, or it is a lazy conjugate, or the
            group has fused=True and torch's fused kernel cannot update the parameter.
    """
    p = member.param
    _check_dtype(member)
    if group["fused"] and (p.dtype not in (*FLOATS, torch.float64) or p.device.type == "meta"):
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported devices, but "
            f"{member.name!r} {tuple(p.shape)} is {p.dtype} on {p.device}. Put it into a group with fused=None."
        )
    if p.dtype in _EXACT:
        plain = True
    else:
        # A 16-bit parameter with huber decay counts as packed. Otherwise torch's step and the decay would round it twice.
        # In float16, torch's loop also rounds eps to 0, and divides 0 by it.
        plain = storage.plain and not (p.dtype in HALVES and (decay.is_huber(group) or leaves_open(group)))
    if not plain:
        return "packed"
    return "loop" if group["fused"] and not _fits_fused(p, grad, state) else "asked"


def _check_dtype(member: Member) -> None:
    p = member.param
    if p.dtype not in (*FLOATS, *_EXACT):
        raise RuntimeError(
            f"{member.name!r} {tuple(p.shape)} is {p.dtype}, and AdamW updates floating point and complex parameters only. "
            "Take it out of optimizer.param_groups, or clear its gradient."
        )
    if p.is_conj():
        raise RuntimeError(
            f"{member.name!r} {tuple(p.shape)} is a lazy conjugate of other numbers, and cannot be updated in place. Use "
            "p.data = p.data.resolve_conj()."
        )


def _fits_fused(p: Tensor, grad: Tensor, state: Mapping[str, Any]) -> bool:
    """Return whether all arrays lie in memory in the same order. torch's fused kernels do not look at strides."""
    held = local(p)
    stride = held.stride()
    if not is_dense(held) or local(grad).stride() != stride or held.is_neg() or local(grad).is_neg():
        return False
    return all(local(state[key]).stride() == stride for key in MOMENTS if key in state)
