"""Which backend updates a parameter, and the effective hyperparameters both of them use."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..state.members import Member, is_dense, local
from ..state.storage import CODES, FLOATS, MOMENTS


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors; Triton reads this once, as the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


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
