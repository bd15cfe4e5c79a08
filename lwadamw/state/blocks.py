"""Blocks: which parameters have moments in 8 bits, and where the blocks that share a scale lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .members import is_of_fsdp1
from .places import place_of, whole_shape

QUANT: Final = 128  # elements that share one scale in an 8-bit moment
QUANT_LEAST: Final = 4096  # parameters with fewer elements keep 32-bit moments


def quantizes(p: Tensor, segments: Sequence[int] = ()) -> bool:
    """Return whether the moments of a parameter are kept in 8 bits where its group asks for 8 bits.

    The answer depends on the whole parameter only, never on how it is sharded. So a checkpoint has the same dtypes in every
    layout. A layout that cuts blocks is refused, see `cut`.

    Moments are in 8 bits if the parameter has at least QUANT_LEAST elements, if it has more than one dimension, and if no
    block of QUANT elements crosses from one segment to the next. A vector would save little, and few ways to shard it end
    at whole blocks. A flat shard has one dimension too. Its whole parameter decides if `place_flat_shard` has told of it, and
    else the shard counts as a part of a matrix.

    Args:
        p: the parameter.
        segments: the number of elements of each segment of the whole parameter; () for one segment.
    """
    whole = whole_shape(p)
    if math.prod(whole) < QUANT_LEAST or any(size % QUANT for size in segments):
        return False
    return len(whole) > 1 or (place_of(p) is None and _is_flat_shard(p))


def _is_flat_shard(p: Tensor) -> bool:
    """Return whether an engine has made a tensor of one dimension from a part of a parameter.

    Engines step plain tensors that are no parameters of a module. FullyShardedDataParallel steps parameters that it has
    marked.
    """
    return not hasattr(p, "device_mesh") and (not isinstance(p, torch.nn.Parameter) or is_of_fsdp1(p))


def scale_shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape in which the state of a plain tensor has the scales of an 8-bit moment.

    There is one scale for each block of QUANT elements in memory order. If the rows of the tensor consist of whole blocks, the
    scales keep its other dimensions. Else they are flat.

    Args:
        p: the parameter, no DTensor.

    Examples:
        >>> scale_shape(torch.empty(32, 256)), scale_shape(torch.empty(50, 100))
        ((32, 2), (40,))
    """
    if p.ndim and _in_order(p) and p.shape[-1] % QUANT == 0:
        return (*p.shape[:-1], p.shape[-1] // QUANT)
    return (-(-p.numel() // QUANT),)


def whole_scale_shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales of a whole parameter: in checkpoints, and as a DTensor in the state of a DTensor.

    It follows from the shape of the whole parameter, so it is the same in every layout. It is that of `scale_shape` where rows
    are whole blocks. Else, if several slices p[i] together are whole blocks, dimension 0 counts such bundles of slices. So
    scales can be sharded as the parameter is.

    Args:
        p: the parameter.

    Examples:
        >>> whole_scale_shape(torch.empty(32, 256)), whole_scale_shape(torch.empty(128, 70))
        ((32, 2), (2, 35))
    """
    shape, count = p.shape, -(-p.numel() // QUANT)
    slices = _slices_of_a_bundle(p)
    bundles = (count,) if slices is None else (shape[0] // slices, math.prod(shape[1:]) * slices // QUANT)
    whole = (*shape[:-1], shape[-1] // QUANT) if _has_whole_rows(p) else bundles
    if _in_order(p):
        return whole
    # Codes of another memory layout are cut into other blocks. So their scales must have another shape.
    return (count,) if whole != (count,) else (count, 1)


def local_scale_shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales that this process holds of a DTensor.

    Args:
        p: a DTensor, for which `cut` returns None.
    """
    whole, held = whole_scale_shape(p), p.to_local()  # type: ignore[attr-defined]
    if not p.is_contiguous():
        return whole
    if _has_whole_rows(p):
        return (*held.shape[:-1], held.shape[-1] // QUANT)
    slices = _slices_of_a_bundle(p)
    return whole if slices is None else (held.shape[0] // slices, whole[1])


def as_scales(p: Tensor, held: Tensor) -> Tensor:
    """Return local scales as a DTensor that is sharded as the parameter is.

    Args:
        p: a DTensor, for which `cut` returns None.
        held: float32, the scales of the local shard, in the shape of `local_scale_shape`.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh, shape = p.device_mesh, whole_scale_shape(p)  # type: ignore[attr-defined]
    # A placement on a mesh dimension of one process cuts nothing, and its dimension need not exist in the scales.
    placements = [
        Replicate() if size == 1 else placement
        for size, placement in zip(mesh.shape, p.placements, strict=True)  # type: ignore[attr-defined]
    ]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def cut(p: Tensor) -> str | None:
    """Say how the layout of a parameter cuts blocks of QUANT elements.

    All processes get the same answer, because only the shape of the whole, the mesh and the placements are looked at.

    Args:
        p: the parameter, of any shape. A tensor that is no DTensor is not cut.

    Returns:
        A part of a sentence whose subject is the parameter. None if every shard consists of whole blocks, on every process.

    Examples:
        >>> print(cut(torch.empty(64, 70)))
        None
    """
    parts, strided = _parts(p)
    if not parts or _ends_at_blocks(p, parts, strided):
        return None
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return (
        f"is sharded as {placements} over a mesh of {tuple(mesh.shape)}, so that a shard would begin inside a block of {QUANT} "
        "elements that share one scale"
    )


def _parts(p: Any) -> tuple[dict[int, list[int]], set[int]]:
    """Return into how many shards each mesh dimension cuts the dimensions of a DTensor, and which have strided shards."""
    parts: dict[int, list[int]] = {}
    strided = set()
    if hasattr(p, "device_mesh"):
        for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
            dim = getattr(placement, "dim", None)
            if dim is not None and size > 1:
                parts.setdefault(dim % p.ndim, []).append(size)
                if getattr(placement, "split_factor", 1) > 1:
                    strided.add(dim % p.ndim)
    return parts, strided


def _ends_at_blocks(p: Tensor, parts: dict[int, list[int]], strided: set[int]) -> bool:
    """Return whether every shard begins and ends where a block does."""
    if not p.is_contiguous():
        return False
    if _has_whole_rows(p):
        units = {p.ndim - 1: QUANT}
    else:
        slices = _slices_of_a_bundle(p)
        if slices is None or any(dim > 0 for dim in parts):
            return False
        units = {0: slices}
    for dim, sizes in parts.items():
        unit = units.get(dim, 1)
        even = p.shape[dim] % (unit * math.prod(sizes)) == 0
        if unit > 1 and not even and (dim in strided or not _begins_at_units(p.shape[dim], sizes, unit)):
            return False
    return True


def _begins_at_units(size: int, parts: Sequence[int], unit: int) -> bool:
    """Return whether all shards of a dimension begin at multiples of `unit`, if DTensor cuts it once for each of `parts`."""
    sizes = {size}
    for n in parts:
        pieces = set()
        for length in sizes:
            chunk = -(-length // n)
            if 0 < chunk < length and chunk % unit:
                return False
            pieces |= {chunk, length % chunk if chunk else 0}
        sizes = pieces
    return True


def _in_order(p: Tensor) -> bool:
    """Return whether state of a parameter has its elements in memory in the order of their indices.

    State of a parameter with gaps in memory has none.
    """
    return p.is_contiguous() or (not hasattr(p, "device_mesh") and torch.empty_like(p, device="meta").is_contiguous())


def _has_whole_rows(p: Tensor) -> bool:
    """Return whether the last dimension consists of whole blocks."""
    return p.ndim > 0 and p.shape[-1] % QUANT == 0


def _slices_of_a_bundle(p: Tensor) -> int | None:
    """Return the least number of slices p[i] that together are whole blocks.

    None if the parameter does not divide into such bundles.
    """
    if p.ndim == 0:
        return None
    slices = QUANT // math.gcd(math.prod(p.shape[1:]), QUANT)
    return slices if p.shape[0] % slices == 0 else None
