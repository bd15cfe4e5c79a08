"""Packing: parameters and state of any storage type as float32 and back, in plain torch.

What kernels/weights.py, kernels/moments.py and kernels/stochastic.py do in registers; the formulas are there. Serves
checkpoints, conversions, and the torch backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import decay, keys
from .members import local
from .storage import (
    ARRAYS,
    CODES,
    MOMENTS,
    QUANT,
    SCALES,
    STATE,
    kept_weight,
    scale_shape,
    wanted_companion,
    wanted_dtype,
)

_TINY = 2.0**-90
_MASK = 0xFFFFFFFF
_DRAW = 8
_ROUNDS = 7


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, as a view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def like(p: Tensor, held: Tensor) -> Tensor:
    """A local tensor as what the parameter is: a DTensor of the same placements, or itself."""
    if local(p) is p:
        return held
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def encode(values: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """8-bit codes of a dense float32 tensor, in its shape and memory layout, and one scale per QUANT elements, flat.

    torch.int8 encodes any values, torch.uint8 values >= 0 by their square roots. random: 16 bits for each element in memory
    order, to round with; None: to the nearest code.
    """
    largest = 127.0 if dtype == torch.int8 else 255.0
    x = flat(values) if dtype == torch.int8 else flat(values).sqrt()
    blocks = torch.nn.functional.pad(x, (0, -len(x) % QUANT)).view(-1, QUANT)
    top = blocks.abs().amax(1, keepdim=True)
    zero = top < _TINY
    power = (blocks.abs() * torch.where(zero, 0.0, largest**4 / torch.where(zero, 1.0, top))).nan_to_num_()
    roots = power.sqrt().sqrt()
    if random is None:
        codes = roots.round()
    else:
        lower = (roots - 0.5).round().clamp_(max=largest - 1).double()
        low, high = lower**4, (lower + 1) ** 4
        if dtype == torch.uint8:
            low, high, power = low**2, high**2, power.double() ** 2
        u = torch.nn.functional.pad((random.view(-1).double() + 0.5) / 2**16, (0, -len(x) % QUANT)).view(-1, QUANT)
        codes = lower + (low + u * (high - low) < power)
    codes = torch.where(blocks < 0, -codes, codes) if dtype == torch.int8 else codes.clamp_(min=1)
    out = torch.empty_like(values, dtype=dtype)
    flat(out).copy_(codes.view(-1)[: len(x)])
    return out, torch.where(zero, 0.0, top * (1.0 / largest**4)).view(-1)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 values of a dense tensor of 8-bit codes, in its shape and memory layout."""
    c = flat(codes).float()
    x = (c * c.abs()) * (c * c) * scales.reshape(-1).repeat_interleave(QUANT)[: len(c)]
    out = torch.empty_like(codes, dtype=torch.float32)
    flat(out).copy_(x * x if codes.dtype == torch.uint8 else x)
    return out


def read_moment(state: Mapping[str, Any], key: str) -> Tensor:
    """A moment as a new float32 tensor (float64 and complex ones as they are), local."""
    moment = local(state[key])
    if moment.dtype in CODES:
        return decode(moment, local(state[SCALES[key]]))
    return moment.float() if moment.dtype.itemsize < 4 else moment.clone()


@torch.no_grad()
def write_moment(state: Mapping[str, Any], key: str, values: Tensor, bits: Tensor | None = None) -> None:
    """Round local float32 values into a moment that is there; `bits` as of `hash_bits`, for 8-bit codes."""
    moment = local(state[key])
    if moment.dtype in CODES:
        random = None if bits is None else bits & 0xFFFF if moment.dtype == torch.int8 else bits >> 16
        codes, scales = encode(values, moment.dtype, random)
        moment.copy_(codes)
        local(state[SCALES[key]]).view(-1).copy_(scales)
    else:
        moment.copy_(values)


def split_remainder(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 weight as bfloat16 and int16: (upper << 16) + lower are its bits."""
    bits = torch.where(weight.isnan(), 0x7FC00000, weight.view(torch.int32))
    lower = bits.to(torch.int16)
    return ((bits - lower) >> 16).to(torch.int16).view(torch.bfloat16), lower


def join_remainder(upper: Tensor, lower: Tensor) -> Tensor:
    """The float32 weight of a bfloat16 and an int16.

    >>> bool((join_remainder(*split_remainder(torch.tensor([3.14159265, -0.0]))) == torch.tensor([3.14159265, -0.0])).all())
    True
    """
    return ((upper.view(torch.int16).to(torch.int32) << 16) + lower).view(torch.float32)


def read_weight(p: Tensor, state: Mapping[str, Any], kept: str) -> Tensor:
    """The weight a step updates, as a new local float32 tensor.

    A master weight that its parameter is not the rounded copy of has been overtaken: somebody else wrote to the parameter.
    """
    held = local(p.detach())
    if kept == "master":
        master = local(state["master_param"])
        return torch.where(master.to(held.dtype) == held, master, held.float())
    if kept == "remainder":
        return join_remainder(held, local(state["master_param"]))
    return held.float() + local(state["kahan_comp"]) if kept == "kahan" else held.to(torch.float32, copy=True)


@torch.no_grad()
def write_weight(p: Tensor, state: Mapping[str, Any], kept: str, weight: Tensor, random: Tensor | None = None) -> None:
    """Round a local float32 weight, laid out in memory as the parameter is, into parameter and companion.

    random: as of `random_bits`, for each element in memory order; for stochastic rounding, which rounds `weight` too
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


def random_bits(index: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """int32 below 2^16 for elements of the whole parameter, int64 of any shape; see kernels/stochastic.py."""
    draw = index // _DRAW
    c0, c1 = draw & _MASK, draw >> 32
    c2, c3 = torch.full_like(draw, step & _MASK), torch.full_like(draw, stream & _MASK)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    place = index % _DRAW
    word = torch.where(place < 4, torch.where(place < 2, c0, c1), torch.where(place < 6, c2, c3))
    return torch.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(torch.int32)


def hash_bits(index: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """int64 below 2^32 for elements of the whole parameter, int64 of any shape; see kernels/stochastic.py."""
    key = _mixed(torch.tensor((seed & _MASK) ^ 0x9E3779B9))
    key = _mixed(_mixed(key ^ (seed >> 32 & _MASK) ^ stream) ^ step).to(index.device)
    return _mixed((_product(0x9E3779B1, index & _MASK)[1] + key) & _MASK)


def _mixed(h: Tensor) -> Tensor:
    h = _product(0x85EBCA6B, h ^ h >> 16)[1]
    h = _product(0xC2B2AE35, h ^ h >> 13)[1]
    return h ^ h >> 16


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a 32-bit product, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | (low & 0xFFFF)


@torch.no_grad()
def create_state(state: dict[str, Any], p: Tensor, group: Mapping[str, Any], segments: Sequence[int] = ()) -> None:
    """Create what a parameter's state lacks of what its group asks for, laid out in memory as the parameter is.

    Weights that are there win: state with a master weight gets no compensation, and the other way round.
    """
    if decay.is_huber(group) and decay.THRESHOLD not in state:
        weight = read_weight(p, state, kept_weight(p, {}, state))
        state[decay.THRESHOLD] = decay.threshold_of(weight, keys.HUBER_SCALE.of(group))
    for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        if key not in state:
            is_max = key == "max_exp_avg_sq"
            dtype = state["exp_avg_sq"].dtype if is_max else wanted_dtype(p, group, key, segments)
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if key in SCALES and state[key].dtype in CODES and SCALES[key] not in state:
            state[SCALES[key]] = _zero_scales(p)
    companion = wanted_companion(p, group)
    if companion is None or "master_param" in state or "kahan_comp" in state:
        return
    if companion == "kahan_comp":
        state[companion] = torch.zeros_like(p, memory_format=torch.preserve_format)
    elif keys.MASTER_WEIGHTS.of(group) == "remainder":
        state[companion] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    else:
        state[companion] = p.detach().to(torch.float32, memory_format=torch.preserve_format)


@torch.no_grad()
def lay_out(state: dict[str, Any], p: Tensor) -> None:
    """Lay every array of a parameter's state out in memory as the parameter is: blocks of codes follow memory order."""
    stride = torch.empty_like(local(p), device="meta").stride()
    for key in ARRAYS:
        if key not in state or local(state[key]).stride() == stride:
            continue
        old, state[key] = state[key], torch.empty_like(p, dtype=state[key].dtype)
        if old.dtype in CODES:
            values = read_moment({**state, key: old}, key)
            write_moment(state, key, torch.empty_like(local(p), dtype=torch.float32).copy_(values))
        else:
            local(state[key]).copy_(local(old))


def _zero_scales(p: Tensor) -> Tensor:
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return torch.zeros(scale_shape(p), dtype=torch.float32, device=p.device)
    from torch.distributed.tensor import zeros

    shape = (*p.shape[:-1], p.shape[-1] // QUANT)
    return zeros(shape, dtype=torch.float32, device_mesh=mesh, placements=p.placements)  # type: ignore[attr-defined]


@torch.no_grad()
def convert_state(state: dict[str, Any], p: Tensor, group: Mapping[str, Any], segments: Sequence[int] = ()) -> None:
    """Bring a parameter's state to the types its group asks for, each value rounded once."""
    kept = kept_weight(p, group, state)
    weight = read_weight(p, state, kept) if kept in ("master", "remainder", "kahan") else None
    moments = {key: read_moment(state, key) for key in MOMENTS if key in state}
    for key in STATE:
        state.pop(key, None)
    create_state(state, p, {**group, "amsgrad": "max_exp_avg_sq" in moments}, segments)
    for key, values in moments.items():
        write_moment(state, key, values)
    if weight is not None:
        write_weight(p, state, kept_weight(p, {}, state), weight)
