"""Runs: where the elements that a process holds of a parameter lie in the whole parameter.

The local elements, in memory order, form runs. A run is a number of elements that also follow each other in the whole
parameter. Local element i has the index

    first + i + (i // run) * (stride - run)

there: `first` is the index of the first local element, `run` the number of elements of a run, and `stride` the distance
from the start of one run to the start of the next. Example: the second half of the columns of a [3, 8] matrix, sharded over
two processes, has first = 4, run = 4, stride = 8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from torch import Tensor

from .members import is_elsewhere, local

# Run and stride of a tensor whose elements are one single run. The number is longer than any tensor, so the run never ends. It
# is a multiple of layout.DRAW, because the kernels divide run and stride by it.
ENDLESS_RUN: Final = 1 << 60

Stretches = list[tuple[int, int]]  # begin and length of each stretch of one dimension


class Cut(NamedTuple):
    """One dimension of a device mesh, along which a dimension of a tensor is cut.

    Attributes:
        dim: the dimension of the tensor.
        parts: the number of processes along the dimension of the mesh.
        factor: 1 for torch's `Shard`. For `_StridedShard`, its split_factor: the number of parts into which dimensions of the
            mesh that stand further right have cut the tensor before.
    """

    dim: int
    parts: int
    factor: int


def runs_of(p: Tensor) -> tuple[int, int, int] | None:
    """Return (first, run, stride) of the elements that this process holds of a parameter.

    Args:
        p: the parameter. A tensor that is no DTensor is one single run that begins at 0. So is one of a mesh that this process
            is not in, of which it holds no element.

    Returns:
        None if these three numbers do not say where the elements lie. Every process then gets None.
    """
    held = local(p)
    if held is p or is_elsewhere(p):
        return 0, ENDLESS_RUN, ENDLESS_RUN
    mesh = p.device_mesh  # type: ignore[attr-defined]
    cuts, coordinate = [], []
    for parts, place, placement in zip(mesh.shape, mesh.get_coordinate(), p.placements, strict=True):  # type: ignore[attr-defined]
        # _StridedShard is no subclass of Shard in every version of torch.
        if placement.is_shard() or "Shard" in type(placement).__name__:
            if parts > 1:
                cuts.append(Cut(placement.dim % p.ndim, parts, int(getattr(placement, "split_factor", 1))))
                coordinate.append(place)
        elif not placement.is_replicate():
            return None
    if not cuts:
        return 0, ENDLESS_RUN, ENDLESS_RUN
    if not held.is_contiguous():
        return None
    return runs(tuple(p.shape), tuple(cuts), tuple(coordinate), tuple(held.shape))


@lru_cache(maxsize=4096)
def runs(
    shape: tuple[int, ...], cuts: tuple[Cut, ...], coordinate: tuple[int, ...], held: tuple[int, ...]
) -> tuple[int, int, int] | None:
    """Return (first, run, stride) of one part of a tensor. `runs_of` does this for a DTensor.

    Args:
        shape: shape of the whole tensor.
        cuts: how the tensor is cut, one entry for each dimension of the mesh that cuts it, left to right.
        coordinate: which of the parts of each cut the process holds.
        held: shape of what the process holds.

    Examples:
        >>> runs((3, 8), (Cut(1, 2, 1),), (1,), (3, 4))
        (4, 4, 8)
    """
    mine: list[Stretches] = []
    others: list[list[Stretches]] = []  # what processes hold of each dimension, so that all of them get the same answer
    for d, size in enumerate(shape):
        own = [cut for cut in cuts if cut.dim == d]
        place = [at for cut, at in zip(cuts, coordinate, strict=True) if cut.dim == d]
        order = _in_time(own)
        # fully_shard cuts what tensor parallelism has left, so it cuts in the order of time. torch's own functions for
        # placements cut from left to right. The two differ only where the parts of an uneven cut are cut again.
        stretches = None if order is None else _cut_in_time(size, own, order, place)
        if stretches is not None and _length(stretches) == held[d]:
            # Every part is one stretch, and the first process has the longest.
            others.append([_cut_in_time(size, own, order or [], [0] * len(own))])
        else:
            stretches = _cut_from_left(size, own, place)
            everybody = itertools.product(*(range(cut.parts) for cut in own))
            others.append([_cut_from_left(size, own, one) for one in everybody])
        if _length(stretches) != held[d]:
            return None
        mine.append(stretches)
    if any(_describe(shape, some) is None for some in itertools.product(*others)):
        return None
    return _describe(shape, mine)


def _in_time(cuts: Sequence[Cut]) -> list[int] | None:
    """Return the indices of the cuts of one dimension in the order in which they happened; None if the factors tell no order.

    A strided cut of factor f came right after the cuts further right in the mesh that had made f parts.
    """
    order: list[int] = []
    for i in reversed(range(len(cuts))):
        made = [math.prod(cuts[j].parts for j in order[:n]) for n in range(len(order) + 1)]
        if cuts[i].factor not in made:
            return None
        order.insert(made.index(cuts[i].factor), i)
    return order


def _cut_in_time(size: int, cuts: Sequence[Cut], order: Sequence[int], place: Sequence[int]) -> Stretches:
    stretches = [(0, size)]
    for i in order:
        stretches = _part(stretches, cuts[i].parts, place[i])
    return stretches


def _cut_from_left(size: int, cuts: Sequence[Cut], place: Sequence[int]) -> Stretches:
    """Cut as torch's own functions do: a strided cut takes a part of each of `factor` blocks."""
    stretches = [(0, size)]
    for cut, at in zip(cuts, place, strict=True):
        blocks = [_part(stretches, cut.factor, j) for j in range(cut.factor)]
        stretches = _joined(piece for block in blocks for piece in _part(block, cut.parts, at))
    return stretches


def _part(stretches: Stretches, parts: int, place: int) -> Stretches:
    """Return one of the parts that torch.chunk makes of stretches that stand one after the other."""
    share = -(-_length(stretches) // parts)
    begin, end, at = place * share, (place + 1) * share, 0
    out = []
    for first, length in stretches:
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            out.append((first + low, high - low))
        at += length
    return out


def _joined(stretches: Iterable[tuple[int, int]]) -> Stretches:
    out: Stretches = []
    for first, length in stretches:
        if out and sum(out[-1]) == first:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((first, length))
    return out


def _length(stretches: Stretches) -> int:
    return sum(length for _, length in stretches)


def _describe(shape: Sequence[int], held: Sequence[Stretches]) -> tuple[int, int, int] | None:
    """Return (first, run, stride) of the elements at which the stretches of all dimensions meet, or None."""
    if not all(held):
        return 0, ENDLESS_RUN, ENDLESS_RUN
    first = 0
    loops: list[
        tuple[int, int]
    ] = []  # nested loops over the elements, the outermost first: count, and distance in the whole
    for d, stretches in enumerate(held):
        after = math.prod(shape[d + 1 :])
        (begin, length), last = stretches[0], stretches[-1]
        gap = stretches[1][0] - begin if len(stretches) > 1 else 0
        regular = all(one == (begin + i * gap, length) for i, one in enumerate(stretches[:-1]))
        # A last stretch that is shorter ends the elements only if no loop stands around it.
        shorter = last[1] < length and all(count == 1 for count, _ in loops)
        if len(stretches) > 1 and not (
            regular and last[0] == begin + gap * (len(stretches) - 1) and (last[1] == length or shorter)
        ):
            return None
        first += begin * after
        loops += [(len(stretches), gap * after), (length, after)]
    nested: list[tuple[int, int]] = []
    for count, distance in loops:
        if count == 1:
            continue
        if nested and nested[-1][1] == count * distance:
            nested[-1] = (nested[-1][0] * count, distance)
        else:
            nested.append((count, distance))
    if not nested or nested[-1][1] != 1:
        nested.append((1, 1))
    if len(nested) == 1:
        return first, ENDLESS_RUN, ENDLESS_RUN
    return (first, nested[1][0], nested[0][1]) if len(nested) == 2 else None
