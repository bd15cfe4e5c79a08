"""The saved form of a parameter's state: what `state_dict()` returns for it.

torch's distributed checkpoint fills the tensors of the optimizer that loads. It compares shapes, and casts any dtype to any
other. So codes, or half a weight, would be read as numbers by an optimizer that was built with other arguments. To make
this fail, arrays that are no plain numbers have one more dimension in the saved form:

    moments in 8 bits           int8 or uint8 [*shape, 1]
    scales of 8-bit moments     float32, in the shape of `blocks.whole_scale_shape`, which is the same in every layout
    remainder of a weight       uint8 [*shape, 2]    the two bytes of the int16; NCCL and gloo have no collectives for int16
    exp_avg beside a companion  [*shape, 1]          so that an optimizer without companions does not drop the companion

The arrays are views, so whoever fills them fills the state. The keys are those of the state, because torch looks up in the
state which keys a flattened checkpoint has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import keys
from .blocks import scale_shape, whole_scale_shape
from .members import is_elsewhere, is_of_fsdp1, local
from .storage import CODES, COMPANIONS, SCALES


def to_saved(state: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Return the state of a parameter in its saved form.

    Args:
        state: the state of the parameter. It is not changed.
        p: the parameter.

    Returns:
        A new dict, whose tensors share the memory of the state.
    """
    saved = dict(state)
    # FullyShardedDataParallel gathers state as vectors, and refuses codes and remainders because their dtypes differ.
    longer = {"exp_avg"} if any(key in state for key in COMPANIONS) and not is_of_fsdp1(p) else set()
    for key, scales in SCALES.items():
        if isinstance(state.get(key), Tensor) and state[key].dtype in CODES:
            longer.add(key)
            if isinstance(state.get(scales), Tensor):
                saved[scales] = _reshaped(state[scales], whole_scale_shape(state[key]))
    for key in longer:
        if isinstance(state.get(key), Tensor):
            saved[key] = _longer(state[key])
    lower = state.get("master_param")
    if isinstance(lower, Tensor) and lower.dtype == torch.int16:
        saved["master_param"] = _longer(lower, torch.uint8)
    return saved


def from_saved(saved: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Return the state of a parameter from its saved form. State in the form that the step uses stays as it is.

    Earlier versions saved the state as it was. What they saved is accepted too. Codes that `misplaced` finds stay in the saved
    form, which no parameter fits.

    Args:
        saved: an entry of a checkpoint. It is not changed.
        p: the parameter.

    Returns:
        A new dict. Its tensors share the memory of the checkpoint where the layout in memory permits it.
    """
    state, lost = dict(saved), misplaced(saved, p)
    for key, scales in SCALES.items():
        if _is_longer(saved.get(key), p, 1) and key not in lost:
            state[key] = _shorter(saved[key])
            if isinstance(saved.get(scales), Tensor):
                state[scales] = _reshaped(saved[scales], scale_shape(local(state[key])))
    lower = saved.get("master_param")
    if _is_longer(lower, p, 2) and lower is not None and lower.dtype == torch.uint8:
        state["master_param"] = _shorter(lower, torch.int16)
    return state


def misplaced(saved: Mapping[str, Any], p: Tensor) -> list[str]:
    """Return the moments in 8 bits whose codes have been copied into another memory layout since they were saved.

    Blocks of codes follow memory order, so each scale would belong to other codes. The shape of the scales tells of the layout
    that the codes had. Formats without strides, and `contiguous()`, make such copies.

    Args:
        saved: an entry of a checkpoint.
        p: the parameter.
    """
    lost = []
    for key, scales in SCALES.items():
        codes, found = saved.get(key), saved.get(scales)
        if not (isinstance(codes, Tensor) and isinstance(found, Tensor)):
            continue
        if codes.dtype in CODES and _is_longer(codes, p, 1):
            is_plain = local(codes) is codes and local(found) is found
            if is_plain and found.shape != whole_scale_shape(_shorter(codes)):
                lost.append(key)
    return lost


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
    return {**group, **{key.name: key.of(group) for key in keys.STORAGE if key.name in group}}


def _is_longer(tensor: Any, p: Tensor, last: int) -> bool:
    """Return whether a tensor has the dimensions of a parameter and one more of size `last`, here and as a whole."""
    if not isinstance(tensor, Tensor) or tensor.shape != (*p.shape, last):
        return False
    held = local(tensor)
    # Whatever the shape of a DTensor, a process that is not in its mesh holds a tensor of shape (0,).
    return is_elsewhere(p) or (held.ndim == tensor.ndim and held.shape[-1] == last)


def _longer(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a view with one more dimension at the end, of size 1, or of as many elements of `dtype` as an element has."""
    return _mapped(tensor, lambda t: t.unsqueeze(-1) if dtype is None else t.unsqueeze(-1).view(dtype))


def _shorter(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a view without the last dimension. This is the inverse of `_longer`."""

    def shorten(t: Tensor) -> Tensor:
        if dtype is None:
            return t.squeeze(-1)
        if t.stride(-1) != 1 or any(s % (dtype.itemsize // t.itemsize) for s in (*t.stride()[:-1], t.storage_offset())):
            t = t.clone(memory_format=torch.contiguous_format)
        return t.view(dtype).squeeze(-1)

    return _mapped(tensor, shorten)


def _reshaped(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return scales in another shape if they are plain and as many. Their order is the same in every shape."""
    fits = local(scales) is scales and scales.shape != shape and scales.numel() == math.prod(shape)
    return scales.reshape(shape) if fits else scales


def _mapped(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a view that keeps all dimensions but the last to what this process holds of a tensor."""
    held = local(tensor)
    if held is tensor:
        return view(tensor)
    from torch.distributed.tensor import DTensor

    whole = view(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return DTensor.from_local(view(held), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
