"""Singular values of matrices that are split over processes by rows or by columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..state.arrays import Array
from ..state.collectives import READING, add_over
from ..state.members import local, split_dimensions
from ..state.shards import Split
from .spectrum import MOST_ITERATIONS, VECTORS, has_settled, start_vectors

# At most this many numbers are added up over processes at once.
MOST_NUMBERS: Final = 2**22


class Part(NamedTuple):
    """What a process holds of a matrix whose rows are split over processes. It may be empty.

    Attributes:
        rows: [some rows, cols]. A matrix whose columns are split is transposed. The order of rows does not matter.
        shape: shape of the whole matrix, as it is.
        split: over which processes the rows are split.
    """

    rows: Tensor
    shape: tuple[int, int]
    split: Split


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

    The method is the one of `spectrum.top_singular_values`, on W^T W, which is the sum of those of all parts. This is
    collective: an iteration makes one all-reduce for each process group, of [cols, VECTORS] float64 for each matrix. All
    processes have to give the same matrices in the same order. They get the same values. The iteration ends after the same
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
    for split in sorted({part.split for part in parts}, key=lambda split: split.label):
        bundle: list[int] = []
        size = 0
        for i in (i for i, part in enumerate(parts) if part.split == split):
            own = parts[i].rows.shape[1] * VECTORS
            if bundle and size + own > MOST_NUMBERS:
                yield bundle
                bundle, size = [], 0
            bundle.append(i)
            size += own
        yield bundle


def _iterate(parts: Sequence[Part], start: Sequence[Tensor | None]) -> tuple[list[Array], list[Tensor]]:
    rows = [p.rows if p.rows.dtype == torch.float64 else p.rows.float() for p in parts]
    v = [
        start_vectors(w, min(VECTORS, *part.shape), vectors)
        for w, part, vectors in zip(rows, parts, start, strict=True)
    ]
    before: list[Array] | None = None
    now: list[Array] = []
    unsettled = len(parts)
    for iteration in range(MOST_ITERATIONS + 1):
        pieces = []
        for w, vectors in zip(rows, v, strict=True):
            y = w @ vectors
            wide = y.double()
            pieces += [(w.mT @ y).double().flatten(), (wide.mT @ wide).flatten()]
        table = torch.cat([*pieces, pieces[0].new_tensor([float(unsettled)])])
        for group in parts[0].split.groups:
            add_over(table, group, READING)
        *summed, going = torch.split(table, [*map(len, pieces), 1])
        if iteration % 2 == 0:
            host = torch.cat([*summed[1::2], going]).cpu().numpy()
            sizes = [len(gram) for gram in summed[1::2]]
            now = [_roots(gram) for gram in np.split(host[:-1], np.cumsum(sizes)[:-1])]
            if host[-1] == 0:
                break
            if before is not None:
                unsettled = sum(not has_settled(a, b) for a, b in zip(now, before, strict=True))
            before = now
        v = [
            torch.linalg.qr(z.view(vectors.shape).to(vectors.dtype))[0]
            for z, vectors in zip(summed[::2], v, strict=True)
        ]
    return now, v


def _roots(gram: Array) -> Array:
    """Return the square roots of the eigenvalues of a matrix that is given flat, in descending order."""
    size = math.isqrt(len(gram))
    if not np.isfinite(gram).all():
        return np.full(size, math.nan)
    roots: Array = np.sqrt(np.maximum(np.linalg.eigvalsh(gram.reshape(size, size))[::-1], 0.0))
    return roots
