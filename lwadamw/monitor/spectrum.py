"""Top singular values by block power iteration from the vectors of the last time, and where the bulk below them ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..state.arrays import Array

# This many vectors are iterated together. More vectors converge faster, and up to 8 cost little more than one.
VECTORS: Final = 8
# The iteration ends when sigma_1 and sigma_2 change by less than this share of themselves in two iterations. The error of
# sigma_1 is then below 1 %.
CONVERGENCE_TOLERANCE: Final = 1e-3
# Changes below this share of sigma_1 are ignored. A sigma_2 of 0 has rounding errors of this size.
NEGLIGIBLE: Final = 1e-6
MOST_ITERATIONS: Final = 60
# Matrices of one shape are copied together and iterated at once, at most this many elements at a time.
BATCH: Final = 2**22


@torch.no_grad()
def top_singular_values(matrices: Sequence[Tensor], start: Sequence[Tensor | None]) -> tuple[Array, list[Tensor]]:
    """Return the largest singular values of every matrix, and the vectors to start from next time.

    The method is block power iteration on W^T W, or on W W^T if that is smaller. It runs in float32, or in float64 for float64
    matrices. The vectors are orthonormalised at every iteration. The values are Rayleigh-Ritz values in float64, so they
    approach the singular values from below. Small matrices of one shape are iterated together. The iteration ends when sigma_1
    and sigma_2 change by less than CONVERGENCE_TOLERANCE. If the matrix has hardly turned since the last time, the vectors of
    the last time reach that at once.

    Args:
        matrices: the matrices, [rows, cols] each, any float dtype.
        start: for each matrix, the vectors that an earlier call returned for a matrix of the same shape; or None.

    Returns:
        The values, float64[len(matrices), VECTORS], in descending order. They are 0 beyond min(rows, cols), and NaN for a
        matrix that is not finite. And the vectors, [min(rows, cols), min(VECTORS, rows, cols)] each, on the device of the
        matrix.
    """
    values = np.zeros((len(matrices), VECTORS))
    vectors: list[Tensor] = [torch.empty(0, device="cpu")] * len(matrices)
    for indices in _batches(matrices):
        some = [_tall(matrices[i]) for i in indices]
        begin = [start_vectors(w, min(VECTORS, w.shape[1]), start[i]) for w, i in zip(some, indices, strict=True)]
        w, v = (x[0].unsqueeze(0) if len(x) == 1 else torch.stack(x) for x in (some, begin))
        with torch.autocast(w.device.type, enabled=False):
            found, v = _iterate(w, v)
        values[indices, : found.shape[1]] = found
        for i, vector in zip(indices, v.unbind(), strict=True):
            vectors[i] = vector
    return values, vectors


def bulk_edge(values: Sequence[float] | Array, frobenius: float, rows: int, cols: int) -> float:
    """Estimate where the bulk of the singular values ends: the Marchenko-Pastur edge of the matrix without its top directions.

    The edge of a matrix of noise is (sqrt(rows) + sqrt(cols)) * RMS. Top directions are removed one after the other, as long
    as their singular value is above the edge of what remains with them. The result is an estimate, because the spectrum of a
    trained matrix is not quite the spectrum of noise.

    Args:
        values: the top singular values, in descending order.
        frobenius: Frobenius norm of the whole matrix.
        rows: number of rows of the matrix.
        cols: number of columns of the matrix.
    """
    squares, edge = frobenius**2, 0.0
    for taken, value in enumerate((*values, 0.0)):
        r, c = rows - taken, cols - taken
        edge = (math.sqrt(r) + math.sqrt(c)) * math.sqrt(max(squares, 0.0) / (r * c)) if min(r, c) > 0 else 0.0
        if not value > edge:
            break
        squares -= value**2
    return edge


def matrix_view(p: Tensor, fan_in: int | None) -> Tensor | None:
    """Return a parameter or a segment as the matrix that it multiplies with. None if that is not known.

    A convolution (out, in, taps...) becomes (out, fan_in). One expert (1, out, in) becomes (out, in).

    Args:
        p: the parameter or segment.
        fan_in: its fan_in. It is needed for tensors of more than two dimensions.
    """
    if p.ndim < 2 or p.numel() == 0 or not p.is_floating_point():
        return None
    if p.ndim == 2:
        return p
    if fan_in is None:
        return None
    if math.prod(p.shape[1:]) == fan_in:
        return p.flatten(1)
    return p[0] if p.shape[0] == 1 and is_pack(p.shape, fan_in) else None


def is_pack(shape: Sequence[int], fan_in: float | None) -> bool:
    """Return whether a tensor of this shape packs matrices along its first dimension, such as experts.

    Args:
        shape: its shape.
        fan_in: the fan_in of its matrices. A convolution has a fan_in of all dimensions but the first, and is one matrix.
    """
    return len(shape) == 3 and fan_in in shape[1:] and math.prod(shape[1:]) != fan_in


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of matrices to iterate together: equal in shape, dtype and device, and at most BATCH elements."""
    alike: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((*sorted(matrix.shape), matrix.device, matrix.dtype), []).append(i)
    for indices in alike.values():
        most = max(1, BATCH // matrices[indices[0]].numel())
        yield from (indices[i : i + most] for i in range(0, len(indices), most))


def _tall(matrix: Tensor) -> Tensor:
    """Return the matrix or its transpose, so that rows >= cols, in the dtype to compute in."""
    matrix = matrix.detach()
    tall: Tensor = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return tall if tall.dtype == torch.float64 else tall.float()


def start_vectors(w: Tensor, count: int, vectors: Tensor | None) -> Tensor:
    """Return the vectors to start from: those of the last time, or else random ones, the same on every process.

    Args:
        w: [rows, cols], in the dtype to compute in.
        count: number of vectors.
        vectors: those of the last time, or None.

    Returns:
        [cols, count], orthonormal.
    """
    if vectors is not None and vectors.shape == (w.shape[1], count):
        return vectors.to(w.device, w.dtype)
    # This uses its own generator, because a monitor must not change which random numbers the training sees.
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(w.shape[1], count, generator=generator, dtype=torch.float64, device="cpu")
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.to(w.device, w.dtype)


def _iterate(w: Tensor, v: Tensor) -> tuple[Array, Tensor]:
    """Return singular values, float64[batch, count], and vectors of w[batch, rows, cols], from v[batch, cols, count]."""
    before: Array | None = None
    for iteration in range(MOST_ITERATIONS + 1):
        y = w @ v
        if iteration % 2 == 0:
            now = _ritz(y)
            if before is not None and all(map(has_settled, now, before)):
                break
            before = now
        v = torch.linalg.qr(w.mT @ y)[0]
    return now, v


def has_settled(now: Array, before: Array) -> bool:
    """Return whether the two largest of a matrix's singular values have hardly changed in two iterations.

    Args:
        now: float64[count], in descending order.
        before: the same, two iterations earlier.
    """
    least = CONVERGENCE_TOLERANCE * now[:2] + NEGLIGIBLE * now[:1]
    return not bool((np.abs(now - before)[:2] > least).any())


def _ritz(y: Tensor) -> Array:
    """Return the singular values of y[batch, rows, count], in descending order. This copies to the host once."""
    wide = y.double()
    gram = (wide.mT @ wide).cpu().numpy()
    finite = np.isfinite(gram).all(axis=(1, 2))
    squares = np.linalg.eigvalsh(np.where(finite[:, None, None], gram, 0.0))[:, ::-1]
    values: Array = np.where(finite[:, None], np.sqrt(np.maximum(squares, 0.0)), math.nan)
    return values
