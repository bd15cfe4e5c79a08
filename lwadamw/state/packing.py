"""Packing: weights and moments of any storage type as float32, and back, in plain torch.

This is what kernels/weights.py and kernels/moments.py do in registers; the formulas are there. It serves checkpoints,
conversions, and the torch backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .codes import decode, encode
from .members import flat, local
from .storage import CODES, HALVES, SCALES

_LARGEST_FP16 = torch.finfo(torch.float16).max


def read_moment(state: Mapping[str, Any], key: str) -> Tensor:
    """Return a moment as a new local tensor.

    Args:
        state: the state of one parameter.
        key: "exp_avg", "exp_avg_sq" or "max_exp_avg_sq".

    Returns:
        float32 of the shape of the local parameter. A float64 or complex moment keeps its dtype.
    """
    moment = local(state[key])
    if moment.dtype in CODES:
        return decode(moment, local(state[SCALES[key]]))
    return moment.float() if moment.dtype.itemsize < 4 else moment.clone()


@torch.no_grad()
def write_moment(state: Mapping[str, Any], key: str, values: Tensor, bits: Tensor | None = None) -> None:
    """Round values into a moment that exists already.

    A finite value that float16 cannot hold becomes the largest float16 number: inf would make the weights NaN.

    Args:
        state: the state of one parameter.
        key: "exp_avg", "exp_avg_sq" or "max_exp_avg_sq".
        values: local float32 tensor, laid out in memory as the parameter is.
        bits: from `hash_bits`, one number per element in memory order, to round 8-bit codes at random. None rounds to the
            nearest code. Moments of other dtypes are always rounded to nearest.
    """
    moment = local(state[key])
    if moment.dtype in CODES:
        codes, scales = encode(values, moment.dtype, bits)
        moment.copy_(codes)
        local(state[SCALES[key]]).view(-1).copy_(scales)
    elif moment.dtype == torch.float16:
        moment.copy_(values.clamp(-_LARGEST_FP16, _LARGEST_FP16))
    else:
        moment.copy_(values)


def split_remainder(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 weight into two numbers of 16 bits.

    Args:
        weight: float32 of any shape. Every NaN is stored as the same NaN.

    Returns:
        `upper`, bfloat16, and `lower`, int16. The bits of the weight are (upper << 16) + lower.
    """
    bits = torch.where(weight.isnan(), 0x7FC00000, weight.view(torch.int32))
    lower = bits.to(torch.int16)
    return ((bits - lower) >> 16).to(torch.int16).view(torch.bfloat16), lower


def join_remainder(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the float32 weight that `split_remainder` was given.

    If another writer has changed `upper`, the two halves may be the bits of a NaN although `upper` is none. This happens
    for 0 and for inf. `upper` alone counts then.

    Args:
        upper: bfloat16 of any shape.
        lower: int16 of the same shape.

    Examples:
        >>> weight = torch.tensor([3.14159265, -0.0])
        >>> bool((join_remainder(*split_remainder(weight)) == weight).all())
        True
    """
    high = _bits(upper).to(torch.int32) << 16
    joined = (high + lower).view(torch.float32)
    return torch.where(joined.isnan(), high.view(torch.float32), joined)


def join_compensation(near: Tensor, lost: Tensor) -> Tensor:
    """Return the weight of a parameter and its Kahan compensation.

    If another writer has changed the parameter, their sum may no longer round to the parameter. The parameter alone counts
    then, because the compensation belongs to another value.

    Args:
        near: parameter, bfloat16 or float16 of any shape.
        lost: compensation, of the same shape and dtype.

    Returns:
        float32 of the same shape.

    Examples:
        >>> lost = torch.tensor([0.25, 0.25], dtype=torch.bfloat16)
        >>> join_compensation(torch.tensor([100.0, 0.0], dtype=torch.bfloat16), lost)
        tensor([100.2500,   0.0000])
    """
    # A compensation of exactly half the spacing would round to even, perhaps away from the parameter that it belongs to.
    checked = (near.float() + lost.float() * (1 - 2.0**-8)).to(near.dtype)
    return torch.where(_bits(checked) == _bits(near), near.float() + lost.float(), near.float())


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a 16-bit tensor as int16."""
    return tensor.view(torch.int16)


def read_weight(p: Tensor, state: Mapping[str, Any], kept: str) -> Tensor:
    """Return the weight that a step updates, as a new local float32 tensor. A float64 parameter with a companion gives float64.

    If another writer has changed the parameter, an element of the parameter no longer has the bits of its rounded float32
    master weight. The parameter then counts, and the master weight of this element is ignored.

    Args:
        p: the parameter.
        state: its state; only the companion is read.
        kept: how the weight is kept, from `kept_weight`.
    """
    held = local(p.detach())
    if kept in ("plain", "stochastic"):
        return held.to(torch.float32, copy=True)
    companion = local(state["kahan_comp" if kept == "kahan" else "master_param"])
    if held.dtype not in HALVES:
        return _read_widened(held, companion, kept)
    if kept == "master":
        return torch.where(_bits(companion.to(held.dtype)) == _bits(held), companion, held.float())
    return join_remainder(held, companion) if kept == "remainder" else join_compensation(held, companion)


def _read_widened(held: Tensor, companion: Tensor, kept: str) -> Tensor:
    """Return the weight of a float32 or float64 parameter that has the companion of a parameter of 16 bits.

    An element that a 16-bit dtype holds exactly is the copy of the weight, and the companion has the other digits. Any
    other element already is the weight.
    """
    if kept == "master":
        copies = [companion.to(dtype).to(held.dtype) == held for dtype in HALVES]
        return torch.where(copies[0] | copies[1], companion.to(held.dtype), held)
    near = held.to(torch.bfloat16 if kept == "remainder" else companion.dtype)
    whole = join_remainder(near, companion) if kept == "remainder" else join_compensation(near, companion)
    return torch.where(near.to(held.dtype) == held, whole.to(held.dtype), held)


@torch.no_grad()
def write_weight(p: Tensor, state: Mapping[str, Any], kept: str, weight: Tensor, random: Tensor | None = None) -> None:
    """Round a weight into a parameter and its companion.

    Args:
        p: the parameter.
        state: its state; only the companion is written.
        kept: how the weight is kept, from `kept_weight`.
        weight: local float32 tensor, laid out in memory as the parameter is. Stochastic rounding rounds this tensor too.
        random: from `random_bits`, one number per element in memory order. Needed for stochastic rounding only; without
            it a "stochastic" weight is rounded to nearest.
    """
    held = local(p.detach())
    if kept == "master":
        local(state["master_param"]).copy_(weight)
        held.copy_(weight)
    elif kept == "remainder":
        upper, lower = split_remainder(weight)
        held.copy_(upper)
        local(state["master_param"]).copy_(lower)
    elif kept == "stochastic" and random is not None:
        w = flat(weight)
        bits = torch.where(w.isnan(), 0x7FC00000, w.view(torch.int32)) + random
        w.copy_((bits >> 16 << 16).view(torch.float32))
        held.copy_(weight)
    else:
        held.copy_(weight)
        if kept == "kahan":
            local(state["kahan_comp"]).copy_(weight - held.float())
