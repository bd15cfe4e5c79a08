"""Backend choice: whether the Triton backend or the torch backend updates a parameter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..state.members import Member, is_dense, is_fake, is_in_memory, local
from ..state.storage import CODES, FLOATS, MOMENTS


def has_triton() -> bool:
    """Return whether the package triton is installed. It is not imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Return whether Triton kernels run on CPU tensors, in Triton's interpreter.

    Triton reads the environment variable TRITON_INTERPRET only once, when the kernels are imported for the first time.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def triton_refusal(p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Say why the Triton backend cannot update a parameter.

    Args:
        p: the parameter.
        group: its parameter group.
        state: its optimizer state; may be empty.

    Returns:
        The reason and a remedy, as the end of an error message. None if the Triton backend can update the parameter.
    """
    if not has_triton():
        return "triton is not installed. Install it, or use backend='torch'"
    if group["differentiable"]:
        return "differentiable=True needs autograd through the step. Use backend='torch'"
    p = local(p)
    if is_fake(p):
        return "it is a tensor of FakeTensorMode, which has no memory. Use backend='torch'"
    if p.layout != torch.strided:
        return f"its layout is {p.layout}. Use backend='torch'"
    if p.device.type == "cpu":
        if not interpreting():
            return "it is on the CPU. Move it to a GPU, use backend='torch', or set TRITON_INTERPRET=1 before Python starts"
    elif p.device.type != "cuda":
        return f"it is on {p.device}, and the kernels run on CUDA and ROCm devices. Use backend='torch'"
    elif interpreting() and torch.cuda.is_available():
        return (
            f"TRITON_INTERPRET is set, so the kernels run on the CPU, and it is on {p.device}. Unset TRITON_INTERPRET before "
            "Python starts, move it to the CPU, or use backend='torch'"
        )
    elif not torch.version.hip and torch.cuda.get_device_capability(p.device) < (8, 0):
        return f"{torch.cuda.get_device_name(p.device)} is older than compute capability 8.0. Use backend='torch'"
    if p.dtype not in FLOATS:
        return f"its dtype is {p.dtype}, and the kernels compute in float32. Use backend='torch'"
    if not is_in_memory(p) and p.untyped_storage().nbytes():
        what = "a negated view" if p.is_neg() else f"a {type(p).__name__} without memory of its own"
        return f"it is {what}, and the kernels read memory. Use backend='torch'"
    for key in MOMENTS:
        if key in state and state[key].dtype not in (*FLOATS, *CODES):
            return f"its {key} is {state[key].dtype}, and the kernels compute in float32. Use backend='torch'"
    if not is_dense(p):
        return f"its strides {tuple(p.stride())} leave gaps or overlap. Use p.contiguous() or backend='torch'"
    return None


def wants_torch(group: Mapping[str, Any]) -> bool:
    """Return whether the flags of a group ask for one of torch's own implementations.

    Args:
        group: parameter group. Its keys `differentiable`, `foreach` and `fused` are read.
    """
    asks_for_loop = group["fused"] is None and group["foreach"] is not None
    return bool(group["differentiable"] or group["foreach"] or group["fused"] is False or asks_for_loop)


def use_triton(member: Member, state: Mapping[str, Any], backend: str | None) -> bool:
    """Decide whether the Triton backend updates a parameter. Otherwise the torch backend updates it.

    Args:
        member: the parameter.
        state: its optimizer state; may be empty.
        backend: the optimizer's argument: None, "triton" or "torch".

    Raises:
        RuntimeError: `backend` is "triton" and the Triton backend cannot update this parameter.
    """
    p = member.param
    if backend == "torch" or (backend is None and (wants_torch(member.group) or local(p).device.type == "cpu")):
        return False
    refusal = triton_refusal(p, member.group, state)
    if refusal is not None and backend == "triton":
        raise RuntimeError(f"backend='triton' cannot update {member.name!r} {tuple(p.shape)}: {refusal}.")
    return refusal is None
