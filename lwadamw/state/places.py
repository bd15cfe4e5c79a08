"""Places: where a flat shard lies in its whole parameter, as the engine that cut it has told.

A plain tensor does not say of which matrix it is a piece. An engine that cuts parameters into flat pieces knows, and may
replace its tensors after the optimizer exists. So the place is kept with the tensor, and not with an optimizer or a name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .members import local
from .names import give_name

_ATTRIBUTE = "_lwadamw_place"


class Place(NamedTuple):
    """Where the elements of a flat shard lie in the whole parameter.

    Attributes:
        whole: the shape of the whole parameter.
        block: begin and end of the block of which the shard is a piece, for each dimension of `whole`.
        first: index of the first element of the shard in the flattened block.
        numel: the number of elements of the shard.
    """

    whole: tuple[int, ...]
    block: tuple[tuple[int, int], ...]
    first: int
    numel: int

    def runs(self) -> tuple[int, int, int] | None:
        """Return (first, run, stride) of the elements in the flattened whole.

        The elements form runs of `run` neighbours in the whole. The runs begin `stride` elements apart, the first at
        `first`. A shard that is one run has its own length, or 1, as run and as stride.

        Returns:
            None if three numbers cannot say it: the shard begins inside a run and does not end in it, or the runs are not
            evenly spaced.
        """
        if self.numel == 0:
            return 0, 1, 1
        after = [math.prod(self.whole[d + 1 :]) for d in range(len(self.whole))]
        sizes = [end - begin for begin, end in self.block]
        cut = [d for d, size in enumerate(sizes) if size != self.whole[d]]
        start = sum(begin * a for (begin, _), a in zip(self.block, after, strict=True))
        last = cut[-1] if cut else 0
        run = sizes[last] * after[last] if sizes else 1
        number, inside = divmod(self.first, run)
        # The rows before the last cut dimension are numbered in the block, and have to be found again in the whole.
        where = start + inside
        for d in reversed(range(last)):
            number, index = divmod(number, sizes[d])
            where += index * after[d]
        if inside + self.numel <= run:
            return where, self.numel, self.numel
        evenly = all(sizes[d] == self.whole[d] for d in range(1, last))
        return (where, run, self.whole[last] * after[last]) if inside == 0 and evenly else None


def place_flat_shard(
    p: Tensor,
    whole_shape: Sequence[int],
    first: int,
    *,
    block: Sequence[tuple[int, int]] | None = None,
    name: str | None = None,
) -> None:
    """Tell where a flat shard lies in its whole parameter.

    An engine that cuts parameters into flat pieces calls this for every piece that it gives to an optimizer, before the
    piece takes its first step, and again when it replaces the tensor or cuts anew. The optimizer may exist already. Then
    stochastic rounding and 8-bit moments draw the random bits that the whole parameter would draw, however it is cut.
    Without a place, a plain tensor counts as a whole parameter.

    The place does not say which processes hold the other pieces: `AdamW(shard_group=...)` says it, or
    `AdamW.set_shard_group`. Both are needed for singular values of the whole parameter. Place and name are kept in the tensor.
    Copies of a parameter do not have them.

    Args:
        p: the piece, a plain tensor with its elements in memory order, of any shape. It may be empty.
        whole_shape: shape of the whole parameter.
        first: index of the first element of the piece in the flattened whole, or in the flattened block.
        block: begin and end for each dimension, if the piece was cut from a block of the whole, as tensor parallelism
            leaves one on every process. None: from the whole.
        name: name of the whole parameter, the same on every process. It counts if the optimizer was given no names. None: the
            piece keeps the name that it has.

    Raises:
        TypeError: the tensor is a DTensor, which knows its place.
        ValueError: the block is not one of the whole, the piece does not fit into it, or the tensor is not contiguous.

    Examples:
        >>> import torch
        >>> piece = torch.nn.Parameter(torch.zeros(6))
        >>> place_flat_shard(piece, (4, 5), 8)
    """
    what = f"place_flat_shard: the tensor {tuple(p.shape)}"
    if local(p) is not p:
        raise TypeError(f"{what} is a DTensor, which knows its place. Leave the call out.")
    if not p.is_contiguous():
        raise ValueError(f"{what} is not contiguous. Give the piece as one run of memory: tensor.flatten().")
    whole = tuple(map(int, whole_shape))
    limits = tuple((0, size) for size in whole) if block is None else tuple((int(a), int(b)) for a, b in block)
    if len(limits) != len(whole) or any(not 0 <= a <= b <= n for (a, b), n in zip(limits, whole, strict=True)):
        raise ValueError(
            f"{what} is a piece of block={limits}, which is no block of {whole}. Give (begin, end) for each of the "
            f"{len(whole)} dimensions."
        )
    size = math.prod(b - a for a, b in limits)
    if first < 0 or first + p.numel() > size:
        raise ValueError(
            f"{what} with first={first} ends behind the {size} elements that it was cut from: whole_shape={whole}"
            f"{'' if block is None else f', block={limits}'}. Give the index of its first element there."
        )
    # A plain tuple, so that torch.load(weights_only=True) accepts a parameter that was saved with its attributes.
    setattr(p, _ATTRIBUTE, tuple(Place(whole, limits, int(first), p.numel())))
    if name is not None:
        give_name(p, name)


def place_of(p: Tensor, name: str = "") -> Place | None:
    """Return the place that `place_flat_shard` told, or None.

    Args:
        p: the parameter.
        name: its name, for the error.

    Raises:
        RuntimeError: the parameter has another number of elements now.
    """
    told = getattr(p, _ATTRIBUTE, None)
    place = None if told is None else Place(*told)
    if place is not None and place.numel != p.numel():
        raise RuntimeError(
            f"{name!r} {tuple(p.shape)} was placed as {place.numel} elements of {place.whole}, and has {p.numel()} now. Tell "
            "the place of the new piece: lwadamw.place_flat_shard(p, whole_shape, first)."
        )
    return place


def whole_shape(p: Tensor, name: str = "") -> tuple[int, ...]:
    """Return the shape of the whole parameter: of a DTensor, of a flat shard with a place, else of the tensor itself.

    Args:
        p: the parameter.
        name: its name, for the error.

    Raises:
        RuntimeError: as in `place_of`.
    """
    place = place_of(p, name)
    return tuple(p.shape) if place is None else place.whole
