"""Draws: the numbers that the random bits of a parameter's elements are computed from.

The bits of an element depend on its index in the whole, unsharded parameter (random_bits.py), so that sharding a parameter
does not change how it is rounded. This module says where the elements that this process holds lie in the whole parameter.

The local elements, in memory order, form runs. A run is a number of elements that also follow each other in the whole
parameter. Local element i has the index

    first + i + (i // run) * (stride - run)

there: `first` is the index of the first local element, `run` the number of elements of a run, and `stride` the distance
from the start of one run to the start of the next. Example: the second half of the columns of a [3, 8] matrix, sharded over
two processes, has first = 4, run = 4, stride = 8.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from . import keys
from .members import Member, local
from .names import has_names
from .places import Place, place_of

# Run and stride of a tensor whose elements are one single run. The number is longer than any tensor, so the run never ends. It
# is a multiple of layout.DRAW, because the kernels divide run and stride by it.
ENDLESS_RUN = 1 << 60


def rounding_row(member: Member) -> tuple[int, int, int, int, int]:
    """Return a row of the rounding table, see kernels/layout.py.

    Args:
        member: the parameter.

    Returns:
        (seed, stream, first, run, stride). The seed is the group's `rounding_seed`. The stream is the CRC-32 of the
        parameter's name, or 0 if the group has no names, so that reordering or regrouping named parameters does not
        change how they are rounded. The module docstring explains the other three.

    Raises:
        RuntimeError: first, run and stride cannot describe where the elements of this shard lie in the whole parameter.
    """
    stream = zlib.crc32(member.name.encode()) if has_names(member.group) else 0
    place = place_of(member.param, member.name)
    return (keys.ROUNDING_SEED.of(member.group), stream, *(_runs(member) if place is None else _runs_at(member, place)))


def draw_inputs(member: Member) -> tuple[int, int, Tensor]:
    """Return the arguments of `random_bits` and `hash_bits` for every local element of a parameter.

    Args:
        member: the parameter.

    Returns:
        (seed, stream, index). `index` is int64[n] on the parameter's device: for each of the n local elements, in memory
        order, its index in the whole parameter.

    Raises:
        RuntimeError: as in `rounding_row`.
    """
    seed, stream, first, run, stride = rounding_row(member)
    index = torch.arange(local(member.param).numel(), device=member.param.device)
    return seed, stream, first + index + (index // run * (stride - run) if run != stride else 0)


def _runs_at(member: Member, place: Place) -> tuple[int, int, int]:
    """Return (first, run, stride) of a flat shard."""
    if (found := place.runs()) is None:
        raise RuntimeError(
            f"{member.name!r} {tuple(member.param.shape)} is a flat shard that begins inside a row of the block {place.block} "
            f"of {place.whole}. Stochastic rounding and 8-bit moments round each element with random bits that depend on its "
            "index in the whole parameter, which the kernels cannot compute here. Use rounding='kahan' or "
            "master_weights=torch.float32, with exp_avg_dtype=torch.bfloat16 and exp_avg_sq_dtype=torch.bfloat16."
        )
    first, run, stride = found
    return (first, ENDLESS_RUN, ENDLESS_RUN) if run == stride else found


def _runs(member: Member) -> tuple[int, int, int]:
    """Return (first, run, stride) of the local elements."""
    p = member.param
    held = local(p)
    if held is p or held.numel() in (0, p.numel()):
        return 0, ENDLESS_RUN, ENDLESS_RUN
    found = _offsets(p)
    if found is not None and held.is_contiguous():
        offsets, after = found, [math.prod(p.shape[d + 1 :]) for d in range(p.ndim)]
        last = max(d for d in range(p.ndim) if held.shape[d] != p.shape[d])
        first = sum(o * a for o, a in zip(offsets, after, strict=True))
        if last == 0:
            return first, ENDLESS_RUN, ENDLESS_RUN
        if all(held.shape[d] == p.shape[d] for d in range(1, last)):
            return first, held.shape[last] * after[last], p.shape[last] * after[last]
    raise RuntimeError(
        f"{member.name!r} {tuple(p.shape)} is sharded as {p.placements}. Stochastic rounding and 8-bit moments round each "  # type: ignore[attr-defined]
        "element with random bits that depend on its index in the whole parameter, and for this sharding the index is not "
        "known. Use rounding='kahan' or master_weights=torch.float32, with exp_avg_dtype=torch.bfloat16 and "
        "exp_avg_sq_dtype=torch.bfloat16."
    )


def _offsets(p: Tensor) -> list[int] | None:
    """Return the index of a DTensor's first local element in each dimension, or None for placements other than Shard."""
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
