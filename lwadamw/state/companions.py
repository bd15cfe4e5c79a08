"""State of a parameter that has another dtype than when its state was made.

A run that kept its weights in bfloat16 with a companion may go on in float32, and the other way round: somebody loads its
checkpoint into a float32 model, or calls `model.float()`. The companion of a float32 parameter is merged into the
parameter, so no digit is lost. Where a companion can neither be used nor be merged, it is refused. Moments of any dtype serve
parameters of up to 32 bits. A float64 parameter gets float64 moments, as torch's own implementations need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .blocks import cut, local_scale_shape, scale_shape, whole_scale_shape
from .members import local, wrap_like
from .packing import read_moment, read_weight
from .storage import CODES, COMPANIONS, FLOATS, HALVES, MOMENTS, SCALES, kept_weight

WIDE = (torch.float32, torch.float64)  # dtypes that need no companion: they hold every digit themselves


def misfit(p: Tensor, state: Mapping[str, Any]) -> str | None:
    """Say why the companion in a parameter's state cannot be used with the parameter.

    Args:
        p: the parameter.
        state: its state, or the entry of a checkpoint.

    Returns:
        What is wrong, as a part of a sentence. None if there is no companion, or if it can be used or merged.
    """
    for key in COMPANIONS:
        if key not in state:
            continue
        dtype = state[key].dtype
        known = (torch.float32, torch.int16) if key == "master_param" else HALVES
        if dtype not in known:
            return f"{key} is {dtype}, and can only be {' or '.join(map(str, known))}"
        if p.dtype in WIDE:
            continue
        if p.dtype not in HALVES:
            return f"{key} belongs to a parameter of 16 bits, and the parameter is {p.dtype}"
        if dtype == torch.int16 and p.dtype != torch.bfloat16:
            return f"{key} is the lower half of a float32 whose upper half is torch.bfloat16, and the parameter is {p.dtype}"
        if key == "kahan_comp" and dtype != p.dtype:
            return f"{key} is what rounding to {dtype} lost, and the parameter is {p.dtype}"
    return None


def misfit_of_codes(p: Tensor, state: Mapping[str, Any]) -> str | None:
    """Say why the codes or the scales of an 8-bit moment cannot be used.

    Codes without scales have no values. Scales without codes show that a loader has taken the codes for values.

    Args:
        p: the parameter.
        state: its state, or the entry of a checkpoint.

    Returns:
        What is wrong, as a part of a sentence. None if every moment in codes has its scales and no other moment has any.
    """
    for key, scales in SCALES.items():
        if key not in state:
            continue
        codes, found = state[key], state.get(scales)
        if codes.dtype not in CODES:
            if found is not None:
                return (
                    f"it has {scales}, which belongs to codes of 8 bits, and {key} is {codes.dtype}. Something has read the "
                    "codes as values"
                )
            continue
        if found is None:
            return f"{scales} has shape none and {key} is kept in codes of 8 bits, which need it"
        wrapped = local(codes) is not codes
        wanted = whole_scale_shape(p) if wrapped else scale_shape(local(p))
        fits = found.shape == wanted and (local(found) is not found) == wrapped
        if not wrapped:  # the codes may have been copied into another memory layout
            fits = fits and found.shape == scale_shape(codes)
        if wrapped and fits and cut(p) is None:
            fits = local(found).shape == local_scale_shape(p)
        if not fits or found.dtype != torch.float32:
            return (
                f"{scales} has shape {tuple(found.shape)} and {found.dtype}, and {key} needs {wanted} and torch.float32"
            )
    return None


@torch.no_grad()
def settle(p: Tensor, state: dict[str, Any]) -> None:
    """Make a parameter and its state fit together after the dtype of the parameter has changed.

    A float32 or float64 parameter takes the digits over that the companion holds, and the companion goes. A parameter of
    16 bits that is the copy of its float32 master weight in the other 16-bit dtype becomes the copy in its own dtype: a later
    step would else take the coarser values for values that somebody has written.

    Args:
        p: the parameter. It is changed in place.
        state: its state, changed in place. `misfit` has returned None for it.
    """
    kept = kept_weight(p, {}, state)
    held = local(p.detach())
    if p.dtype in WIDE:
        if kept in ("master", "remainder", "kahan"):
            held.copy_(read_weight(p, state, kept))
        for key in COMPANIONS:
            state.pop(key, None)
    elif kept == "master":
        master = local(state["master_param"])
        other = HALVES[1 - HALVES.index(p.dtype)]
        copied = (held == master.to(other).to(p.dtype)) & held.isfinite() & (held != 0)
        held.copy_(torch.where(copied, master.to(p.dtype), held))
    if p.dtype not in FLOATS:
        for key in MOMENTS:
            if key in state and state[key].dtype != p.dtype:
                state[key] = wrap_like(p, read_moment(state, key).to(p.dtype))
        for key in SCALES.values():
            state.pop(key, None)
