"""Blocks: which parameters have moments in 8 bits, and where the blocks that share a scale lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

QUANT: Final = 128  # elements that share one scale in an 8-bit moment
QUANT_LEAST: Final = 4096  # parameters with fewer elements keep 32-bit moments


def quantizes(p: Tensor, segments: Sequence[int] = ()) -> bool:
    """Return whether the moments of a parameter are kept in 8 bits where its group asks for 8 bits.

    The answer depends on the whole parameter only, never on how it is sharded. So a checkpoint has the same dtypes in every
    layout. A layout that cannot hold the codes is refused, see `holds_blocks`.

    Moments are in 8 bits if the parameter has at least QUANT_LEAST elements, if it has more than one dimension, and if no
    block of QUANT elements crosses from one segment to the next. A vector would save little, and few ways to shard it end
    at whole blocks. A flat shard of an engine has one dimension too, but it is a part of a matrix.

    Args:
        p: the parameter.
        segments: the number of elements of each segment; () for one segment.
    """
    if p.numel() < QUANT_LEAST or any(size % QUANT for size in segments):
        return False
    return p.ndim > 1 or _is_flat_shard(p)


def _is_flat_shard(p: Tensor) -> bool:
    """Return whether an engine has made a tensor of one dimension from a part of a parameter.

    Engines step plain tensors that are no parameters of a module. FullyShardedDataParallel keeps them as parameters, and
    marks them.
    """
    if hasattr(p, "device_mesh"):
        return False
    return not isinstance(p, torch.nn.Parameter) or getattr(p, "_fsdp_flattened", False)


def holds_blocks(p: Tensor) -> bool:
    """Return whether every shard of a parameter consists of whole blocks of QUANT elements, on every process.

    All processes get the same answer, because only the shape of the whole, the mesh and the placements are looked at.

    Args:
        p: the parameter, of any shape. A tensor that is no DTensor always holds whole blocks.

    Example:
        >>> holds_blocks(torch.empty(64, 70))
        True
    """
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return True
    parts: dict[int, list[int]] = {}  # by dimension of the parameter: the number of shards of each mesh dimension
    strided = set()
    for size, placement in zip(mesh.shape, p.placements, strict=True):  # type: ignore[attr-defined]
        dim = getattr(placement, "dim", None)
        if dim is not None and size > 1:
            parts.setdefault(dim % p.ndim, []).append(size)
            if getattr(placement, "split_factor", 1) > 1:
                strided.add(dim % p.ndim)
    if parts and not p.is_contiguous():
        return False
    rows = _rows_of_a_block(p)
    for dim, sizes in parts.items():
        if rows is None or (rows > 1 and dim > 0):
            return False
        unit = rows if rows > 1 else QUANT if dim == p.ndim - 1 else 1
        even = p.shape[dim] % (unit * math.prod(sizes)) == 0
        if unit > 1 and not even and (dim in strided or not _cuts_whole(p.shape[dim], sizes, unit)):
            return False
    return True


def _cuts_whole(size: int, parts: Sequence[int], unit: int) -> bool:
    """Return whether every part begins at a multiple of `unit` if a dimension is cut as DTensor cuts it."""
    sizes = {size}
    for n in parts:
        cut = set()
        for length in sizes:
            chunk = -(-length // n)
            if 0 < chunk < length and chunk % unit:
                return False
            cut |= {chunk, length % chunk if chunk else 0}
        sizes = cut
    return True


def _rows_of_a_block(p: Tensor) -> int | None:
    """Return the least number of rows, slices p[i], that are whole blocks. 1 if this holds within the last dimension.

    None if the whole parameter does not divide into such rows.
    """
    if p.ndim == 0:
        return None
    if p.shape[-1] % QUANT == 0:
        return 1
    rows = QUANT // math.gcd(math.prod(p.shape[1:]), QUANT)
    return rows if rows > 1 and p.shape[0] % rows == 0 else None


def scale_shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales of an 8-bit moment: one scale per block of QUANT elements in memory order.

    If the last dimension consists of whole blocks, the scales keep the other dimensions. Else, if several rows together are
    whole blocks, dimension 0 of the scales counts such bundles of rows. So scales can be sharded as the parameter is. Else
    they are flat.

    Args:
        p: the parameter, or what a process holds of it if `holds_blocks` is true.

    Example:
        >>> scale_shape(torch.empty(32, 256)), scale_shape(torch.empty(64, 70)), scale_shape(torch.empty(50, 100))
        ((32, 2), (1, 35), (40,))
    """
    if p.ndim and p.is_contiguous():
        rows = _rows_of_a_block(p)
        if rows == 1:
            return (*p.shape[:-1], p.shape[-1] // QUANT)
        if rows is not None:
            return (p.shape[0] // rows, math.prod(p.shape[1:]) * rows // QUANT)
    return (-(-p.numel() // QUANT),)


def local_scale_shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales that this process holds of a DTensor.

    Args:
        p: a DTensor, for which `holds_blocks` is true.
    """
    whole, held = scale_shape(p), p.to_local()  # type: ignore[attr-defined]
    rows = _rows_of_a_block(p) if p.is_contiguous() else None
    if rows == 1:
        return (*held.shape[:-1], held.shape[-1] // QUANT)
    return whole if rows is None else (held.shape[0] // rows, whole[1])


def as_scales(p: Tensor, held: Tensor) -> Tensor:
    """Return local scales as a DTensor that is sharded as the parameter is.

    Args:
        p: a DTensor, for which `holds_blocks` is true.
        held: float32, the scales of the local shard, in the shape of `local_scale_shape`.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh, shape = p.device_mesh, scale_shape(p)  # type: ignore[attr-defined]
    # A placement on a mesh dimension of one process cuts nothing, and its dimension need not exist in the scales.
    placements = [
        Replicate() if size == 1 else placement
        for size, placement in zip(mesh.shape, p.placements, strict=True)  # type: ignore[attr-defined]
    ]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
