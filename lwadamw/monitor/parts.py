"""Singular values of matrices that are split over processes: by rows, by columns, or into pieces of any flattened block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..state.arrays import Array
from ..state.collectives import READING, add_over, device_of
from ..state.members import local, split_dimensions
from ..state.places import Place
from ..state.shards import Split
from .spectrum import MOST_ITERATIONS, VECTORS, has_settled, start_vectors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# At most this many numbers are added up over processes at once.
MOST_NUMBERS: Final = 2**22


class Part(NamedTuple):
    """What a process holds of a matrix that is split over processes. It may be empty.

    Attributes:
        rows: [some rows, cols], whole rows of the matrix, in any order. A matrix whose columns are split is transposed. With a
            corner: any block of the matrix, with zeros where others hold the elements.
        shape: shape of the whole matrix, as it is.
        split: over which processes the matrix is split.
        corner: row and column at which the block begins in the matrix. None: whole rows.
    """

    rows: Tensor
    shape: tuple[int, int]
    split: Split
    corner: tuple[int, int] | None = None

    def into_rows(self, values: Tensor) -> Tensor:
        """Return one row of `values` for each row of the matrix, with zeros in rows outside of the block: [rows, k]."""
        return _placed(values, self.shape[0], 0 if self.corner is None else self.corner[0])

    def of_columns(self, values: Tensor) -> Tensor:
        """Return the rows of `values` [cols, k] that belong to the columns of this part."""
        first = 0 if self.corner is None else self.corner[1]
        return values[first : first + self.rows.shape[1]]


def _placed(values: Tensor, size: int, first: int) -> Tensor:
    out = values.new_zeros(size, values.shape[1])
    out[first : first + len(values)] = values
    return out


def matrix_shape(whole: Sequence[int], block: Sequence[tuple[int, int]], fan_in: int | None) -> tuple[int, int] | None:
    """Return the shape of the matrix that a placed parameter is multiplied as; None if it is no matrix.

    Args:
        whole: shape of the whole parameter.
        block: the block of it from which pieces were cut.
        fan_in: its fan_in. It is needed for tensors of more than two dimensions.
    """
    if len(whole) == 2:
        return (whole[0], whole[1]) if math.prod(whole) else None
    flat_columns = all((begin, end) == (0, size) for (begin, end), size in list(zip(block, whole, strict=True))[1:])
    if len(whole) < 2 or not math.prod(whole) or not flat_columns or math.prod(whole[1:]) != fan_in:
        return None
    return whole[0], math.prod(whole[1:])


def placed_part(p: Tensor, place: Place, shape: tuple[int, int], split: Split) -> Part:
    """Return a piece of a flattened block of a matrix as a block of whole rows of that block.

    Args:
        p: the piece.
        place: where it lies.
        shape: what `matrix_shape` returned.
        split: over which processes the matrix is split.
    """
    (top, _), left = place.block[0], place.block[1][0] if len(place.whole) == 2 else 0
    cols = place.block[1][1] - left if len(place.whole) == 2 else shape[1]
    if not place.numel:
        return absent_part(shape, split, p)
    before, rows = place.first % cols, -(-(place.first % cols + place.numel) // cols)
    values = p.detach().reshape(-1)
    if before or place.numel != rows * cols:  # it begins or ends inside a row
        values = torch.nn.functional.pad(values, (before, rows * cols - before - place.numel))
    return Part(values.view(rows, cols), shape, split, (top + place.first // cols, left))


def absent_part(shape: tuple[int, int], split: Split, like: Tensor | None = None) -> Part:
    """Return the part of a process that holds nothing of a matrix.

    Args:
        shape: shape of the whole matrix.
        split: over which processes it is split.
        like: a tensor of the dtype and on the device of other parts. None: float32 on the device of the process groups.
    """
    dtype, device = (torch.float32, device_of(split.groups)) if like is None else (like.dtype, like.device)
    return Part(torch.zeros(0, shape[1], dtype=dtype, device=device), shape, split, (0, 0))


def part_of(p: Any, fan_in: int | None, split: Split) -> Part | None:
    """Return what this process holds of a DTensor as a part of the matrix that it multiplies with.

    Args:
        p: a DTensor that is split over processes.
        fan_in: its fan_in. It is needed for tensors of more than two dimensions.
        split: how it is split.

    Returns:
        None if the tensor is no matrix, or if it is split both by rows and by columns.
    """
    shape = tuple(p.shape)
    if len(shape) < 2 or p.numel() == 0 or not p.is_floating_point():
        return None
    if len(shape) > 2 and fan_in not in (
        math.prod(shape[1:]),
        *([shape[2]] if len(shape) == 3 and shape[0] == 1 else []),
    ):
        return None
    # The last dimensions of the tensor are the columns: all but the first, or of one expert (1, out, in) the last.
    first_column = 1 if len(shape) == 2 or math.prod(shape[1:]) == fan_in else 2
    cut = {p.placements[d].dim % p.ndim for d in split_dimensions(p)}
    held = local(p.detach())
    cols = math.prod(shape[first_column:])
    whole = (p.numel() // cols, cols)
    if all(dim < first_column for dim in cut):
        return Part(held.reshape(-1, cols), whole, split)
    if len(shape) == 2 and cut == {1}:
        return Part(held.mT, whole, split)
    return None


@torch.no_grad()
def top_singular_values_of_parts(parts: Sequence[Part], start: Sequence[Tensor | None]) -> tuple[Array, list[Tensor]]:
    """Return the largest singular values of matrices that are split over processes, and the vectors to start from next time.

    The method is the one of `spectrum.top_singular_values`, on W^T W. If parts are whole rows, it is the sum of those of all
    parts. If they are blocks, W v is added up first. This is collective: an iteration makes one all-reduce for each process
    group, of [cols, VECTORS] float64 for each matrix, and for blocks another one of [rows, VECTORS]. All processes have to give
    the same matrices in the same order. They get the same values. The iteration ends after the same
    number of calls on all of them: the processes add up how many matrices have not settled.

    Args:
        parts: what this process holds of each matrix.
        start: for each matrix, the vectors that an earlier call returned for a matrix of the same shape; or None.

    Returns:
        The values, float64[len(parts), VECTORS], in descending order. They are 0 beyond min(rows, cols), and NaN for a
        matrix that is not finite. And the vectors, [cols, min(VECTORS, rows, cols)] each.
    """
    values = np.zeros((len(parts), VECTORS))
    vectors: list[Tensor] = [torch.empty(0, device="cpu")] * len(parts)
    for indices in _bundles(parts):
        some = [parts[i] for i in indices]
        with torch.autocast(some[0].rows.device.type, enabled=False):
            found, kept = _iterate(some, [start[i] for i in indices])
        for i, value, vector in zip(indices, found, kept, strict=True):
            values[i, : len(value)], vectors[i] = value, vector
    return values, vectors


def _bundles(parts: Sequence[Part]) -> Iterator[list[int]]:
    """Yield the indices of matrices to iterate together: split alike, and not too large. All processes get the same ones."""
    for split, blocks in sorted(
        {(p.split, p.corner is not None) for p in parts}, key=lambda kind: (kind[0].label, kind[1])
    ):
        bundle: list[int] = []
        size = 0
        for i in (i for i, p in enumerate(parts) if (p.split, p.corner is not None) == (split, blocks)):
            own = (sum(parts[i].shape) if blocks else parts[i].rows.shape[1]) * VECTORS
            if bundle and size + own > MOST_NUMBERS:
                yield bundle
                bundle, size = [], 0
            bundle.append(i)
            size += own
        yield bundle


def _iterate(parts: Sequence[Part], start: Sequence[Tensor | None]) -> tuple[list[Array], list[Tensor]]:
    rows = [p.rows if p.rows.dtype == torch.float64 else p.rows.float() for p in parts]
    groups, blocks = parts[0].split.groups, parts[0].corner is not None
    v = [
        start_vectors(w.new_empty(0, part.shape[1]) if blocks else w, min(VECTORS, *part.shape), vectors)
        for w, part, vectors in zip(rows, parts, start, strict=True)
    ]
    # Every process knows the whole W v of blocks, so one of them adds what follows from it.
    adds_gram = not blocks or all(group.rank() == 0 for group in groups)
    before: list[Array] | None = None
    now: list[Array] = []
    unsettled = len(parts)
    for iteration in range(MOST_ITERATIONS + 1):
        y = [w @ part.of_columns(vectors) for w, part, vectors in zip(rows, parts, v, strict=True)]
        wide = [one.double() for one in y]
        if blocks:
            wide = _added([part.into_rows(one) for part, one in zip(parts, wide, strict=True)], groups)
            y = [_own(one, part).to(w.dtype) for one, part, w in zip(wide, parts, rows, strict=True)]
        pieces = []
        for w, part, one, whole in zip(rows, parts, y, wide, strict=True):
            z, gram = (w.mT @ one).double(), whole.mT @ whole
            z = z if part.corner is None else _placed(z, part.shape[1], part.corner[1])
            pieces += [z, gram if adds_gram else torch.zeros_like(gram)]
        *summed, going = _added([*pieces, pieces[0].new_tensor([[float(unsettled)]])], groups)
        if iteration % 2 == 0:
            host = torch.cat([*map(torch.flatten, summed[1::2]), going[0]]).cpu().numpy()
            sizes = [gram.numel() for gram in summed[1::2]]
            now = [_roots(gram) for gram in np.split(host[:-1], np.cumsum(sizes)[:-1])]
            if host[-1] == 0:
                break
            if before is not None:
                unsettled = sum(not has_settled(a, b) for a, b in zip(now, before, strict=True))
            before = now
        v = [torch.linalg.qr(z.to(vectors.dtype))[0] for z, vectors in zip(summed[::2], v, strict=True)]
    return now, v


def _own(values: Tensor, part: Part) -> Tensor:
    """Return the rows of `values` [rows, k] that belong to the rows of a block."""
    first = 0 if part.corner is None else part.corner[0]
    return values[first : first + len(part.rows)]


def _added(tensors: Sequence[Tensor], groups: Sequence[ProcessGroup]) -> list[Tensor]:
    """Return the sums of tensors over process groups, with one all-reduce for each group."""
    table = torch.cat([tensor.flatten() for tensor in tensors])
    for group in groups:
        add_over(table, group, READING)
    sums = torch.split(table, [tensor.numel() for tensor in tensors])
    return [summed.view(tensor.shape) for summed, tensor in zip(sums, tensors, strict=True)]


def _roots(gram: Array) -> Array:
    """Return the square roots of the eigenvalues of a matrix that is given flat, in descending order."""
    size = math.isqrt(len(gram))
    if not np.isfinite(gram).all():
        return np.full(size, math.nan)
    roots: Array = np.sqrt(np.maximum(np.linalg.eigvalsh(gram.reshape(size, size))[::-1], 0.0))
    return roots
