"""Rounding: what random bits a parameter's elements are drawn, wherever they are kept."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from . import keys
from .members import Member, local

# Run and stride of elements that follow each other in the whole parameter as they do here: longer than any tensor, and a
# multiple of the elements that share a draw.
_WHOLE = 1 << 60


def row_of(member: Member) -> tuple[int, int, int, int, int]:
    """(seed, stream, first, run, stride), a row of the rounding table, see kernels/layout.py.

    The stream follows the parameter's name, where it has one.

    Raises:
        RuntimeError: the elements of a shard are at places in the whole parameter that first, run and stride cannot say.
    """
    named = bool(member.group.get("param_names"))
    stream = zlib.crc32(member.name.encode()) if named else 0
    return (keys.ROUNDING_SEED.of(member.group), stream, *_places(member))


def _places(member: Member) -> tuple[int, int, int]:
    p = member.param
    held = local(p)
    if held is p or held.numel() in (0, p.numel()):
        return 0, _WHOLE, _WHOLE
    found = _offsets(p)
    if found is not None and held.is_contiguous():
        offsets, after = found, [math.prod(p.shape[d + 1 :]) for d in range(p.ndim)]
        last = max(d for d in range(p.ndim) if held.shape[d] != p.shape[d])
        first = sum(o * a for o, a in zip(offsets, after, strict=True))
        if last == 0:
            return first, _WHOLE, _WHOLE
        if all(held.shape[d] == p.shape[d] for d in range(1, last)):
            return first, held.shape[last] * after[last], p.shape[last] * after[last]
    raise RuntimeError(
        f"{member.name!r} {tuple(p.shape)} is sharded as {p.placements}, and its elements cannot be drawn the random bits "  # type: ignore[attr-defined]
        "that stochastic rounding and 8-bit moments round the whole parameter with. Use rounding='kahan' or master_weights, "
        "and bfloat16 moments."
    )


def _offsets(p: Tensor) -> list[int] | None:
    """Index of the local shard's first element in each dimension of a DTensor; None for placements other than Shard."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = p.device_mesh  # type: ignore[attr-defined]
    sizes, offsets = list(p.shape), [0] * p.ndim
    for parts, place, placement in zip(mesh.shape, mesh.get_coordinate(), p.placements, strict=True):  # type: ignore[attr-defined]
        if type(placement) is Shard:
            chunk = -(-sizes[placement.dim] // parts)
            start = min(sizes[placement.dim], chunk * place)
            offsets[placement.dim] += start
            sizes[placement.dim] = min(sizes[placement.dim] - start, chunk)
        elif type(placement) is not Replicate:
            return None
    return offsets


def draws_of(member: Member) -> tuple[int, int, Tensor]:
    """(seed, stream, index int64[n]): what the bits of each local element, in memory order, are drawn by."""
    seed, stream, first, run, stride = row_of(member)
    index = torch.arange(local(member.param).numel(), device=member.param.device)
    return seed, stream, first + index + (index // run * (stride - run) if run != stride else 0)
