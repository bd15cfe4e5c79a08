"""Draws: the numbers that the random bits of a parameter's elements are computed from.

The bits of an element depend on its index in the whole, unsharded parameter (random_bits.py), so that sharding a parameter
does not change how it is rounded. runs.py says where the elements that this process holds lie in the whole parameter.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from . import keys
from .members import Member, local
from .names import is_named
from .places import Place, place_of
from .runs import ENDLESS_RUN, runs_of


def rounding_row(member: Member) -> tuple[int, int, int, int, int]:
    """Return a row of the rounding table, see kernels/layout.py.

    Args:
        member: the parameter.

    Returns:
        (seed, stream, first, run, stride). The seed is the group's `rounding_seed`. The stream is the CRC-32 of the
        parameter's name, or 0 if it has none, so that reordering or regrouping named parameters does not
        change how they are rounded. runs.py explains the other three.

    Raises:
        RuntimeError: first, run and stride cannot describe where the elements of this shard lie in the whole parameter.
    """
    stream = zlib.crc32(member.name.encode()) if is_named(member.param, member.group) else 0
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
    found = runs_of(p)
    if found is not None:
        return found
    raise RuntimeError(
        f"{member.name!r} {tuple(p.shape)} is sharded as {p.placements} over a mesh of {tuple(p.device_mesh.shape)}. "  # type: ignore[attr-defined]
        "Stochastic rounding and 8-bit moments round each element with random bits that depend on its index in the whole "
        "parameter, and for this sharding the kernels cannot compute the index. Use rounding='kahan' or "
        "master_weights=torch.float32, with exp_avg_dtype=torch.bfloat16 and exp_avg_sq_dtype=torch.bfloat16."
    )
