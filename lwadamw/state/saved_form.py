"""The saved form of a parameter's state: what `state_dict()` returns for it.

torch's distributed checkpoint fills the tensors of the optimizer that loads. It compares shapes, and casts any dtype to any
other. So codes, or half a weight, would be read as numbers by an optimizer that was built with other arguments. To make
this fail, arrays that are no plain numbers have one more dimension in the saved form:

    moments in 8 bits           int8 or uint8 [*shape, 1]
    remainder of a weight       uint8 [*shape, 2]    the two bytes of the int16; NCCL and gloo have no collectives for int16
    exp_avg beside a companion  [*shape, 1]          so that an optimizer without companions does not drop the companion

The arrays are views, so whoever fills them fills the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import keys
from .blocks import scale_shape
from .members import local
from .storage import CODES, COMPANIONS, SCALES


def to_saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter in its saved form.

    Args:
        state: the state of the parameter. It is not changed.

    Returns:
        A new dict, whose tensors share the memory of the state.
    """
    saved = dict(state)
    for key, tensor in state.items():
        if key in SCALES and isinstance(tensor, Tensor) and tensor.dtype in CODES:
            saved[key] = _longer(tensor)
    if any(key in state for key in COMPANIONS) and isinstance(state.get("exp_avg"), Tensor):
        saved["exp_avg"] = _longer(state["exp_avg"])
    lower = state.get("master_param")
    if isinstance(lower, Tensor) and lower.dtype == torch.int16:
        saved["master_param"] = _longer(lower, torch.uint8)
    return saved


def from_saved(saved: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Return the state of a parameter from its saved form. State in the form that the step uses stays as it is.

    Args:
        saved: an entry of a checkpoint. It is not changed.
        p: the parameter.

    Returns:
        A new dict. Its tensors share the memory of the checkpoint where the layout in memory permits it.
    """
    state = dict(saved)
    for key in ("exp_avg", "exp_avg_sq"):
        tensor = saved.get(key)
        if isinstance(tensor, Tensor) and tensor.shape == (*p.shape, 1):
            state[key] = _shorter(tensor)
        scales = saved.get(SCALES[key])
        if isinstance(scales, Tensor) and local(scales) is scales and local(p) is p:
            # Earlier versions kept the scales of some shapes flat. Their order is the same.
            shape = scale_shape(p)
            state[SCALES[key]] = scales.reshape(shape) if scales.numel() == torch.Size(shape).numel() else scales
    lower = saved.get("master_param")
    if isinstance(lower, Tensor) and lower.dtype == torch.uint8 and lower.shape == (*p.shape, 2):
        state["master_param"] = _shorter(lower, torch.int16)
    return state


def group_to_saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with the names of dtypes in place of dtypes, which torch's `full_state_dict=True` does not accept.

    Args:
        group: a group of a state dict. It is not changed.
    """
    return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in group.items()}


def group_from_saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with dtypes in place of their names. This is the inverse of `group_to_saved`.

    Args:
        group: a group of a checkpoint. It is not changed.
    """
    named = {str(dtype): dtype for key in keys.STORAGE for dtype in key.values if isinstance(dtype, torch.dtype)}
    storage = keys.named(keys.STORAGE)
    return {k: named[v] if k in storage and isinstance(v, str) and v in named else v for k, v in group.items()}


def _longer(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a view with one more dimension at the end, of size 1, or of as many elements of `dtype` as an element has."""
    return _mapped(tensor, lambda t: t.unsqueeze(-1) if dtype is None else t.unsqueeze(-1).view(dtype))


def _shorter(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a view without the last dimension. This is the inverse of `_longer`."""

    def shorten(t: Tensor) -> Tensor:
        if dtype is None:
            return t.squeeze(-1)
        if t.stride(-1) != 1 or any(s % t.shape[-1] for s in (*t.stride()[:-1], t.storage_offset())):
            t = t.clone(memory_format=torch.contiguous_format)
        return t.view(dtype).squeeze(-1)

    return _mapped(tensor, shorten)


def _mapped(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a view that keeps all dimensions but the last to what this process holds of a tensor."""
    held = local(tensor)
    if held is tensor:
        return view(tensor)
    from torch.distributed.tensor import DTensor

    whole = view(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(view(held), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
