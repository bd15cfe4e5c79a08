"""Top singular values by warm-started block power iteration, and where the bulk below them ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..state.arrays import Array

VECTORS: Final = 8  # iterated together; more converge faster, and up to so many cost little more than one
TOLERANCE: Final = 1e-3  # of sigma_1 and sigma_2 over two iterations; what is then missing of sigma_1 is below 1 %
NEGLIGIBLE: Final = 1e-6  # over sigma_1: rounding of a sigma_2 that is 0
MOST_ITERATIONS: Final = 60
BATCH: Final = 2**22  # elements of equal matrices that are copied together, to iterate them at once


@torch.no_grad()
def top_singular_values(matrices: Sequence[Tensor], start: Sequence[Tensor | None]) -> tuple[Array, list[Tensor]]:
    """The largest singular values of every matrix, from below, and what to start from next time.

    Block power iteration on W^T W, or W W^T where that is smaller, in float32 (float64 for float64), orthonormalised at
    every iteration, values by Rayleigh-Ritz in float64; small matrices of one shape together. Ends where sigma_1 and
    sigma_2 change by less than TOLERANCE, which warm-started vectors do at once if the matrix has hardly turned.

    Args:
        matrices: any float dtype, [rows, cols] each.
        start: vectors that this returned for a matrix of the same shape, or None.

    Returns:
        float64[len(matrices), VECTORS], in descending order; 0 beyond min(rows, cols), NaN for a matrix that is not finite.
        The vectors, [min(rows, cols), min(VECTORS, rows, cols)] each, on the matrix's device.
    """
    values = np.zeros((len(matrices), VECTORS))
    vectors: list[Tensor] = [torch.empty(0)] * len(matrices)
    for indices in _batches(matrices):
        some = [_tall(matrices[i]) for i in indices]
        begin = [_start(w, start[i]) for w, i in zip(some, indices, strict=True)]
        w, v = (x[0].unsqueeze(0) if len(x) == 1 else torch.stack(x) for x in (some, begin))
        with torch.autocast(w.device.type, enabled=False):
            found, v = _iterate(w, v)
        values[indices, : found.shape[1]] = found
        for i, vector in zip(indices, v.unbind(), strict=True):
            vectors[i] = vector
    return values, vectors


def bulk_edge(values: Sequence[float] | Array, frobenius: float, rows: int, cols: int) -> float:
    """Where the singular values of the rest would end if the rest were noise (Marchenko-Pastur):
    (sqrt(rows) + sqrt(cols)) times its RMS.

    The rest is the matrix without those of its top directions that stick out of the edge of what they leave. An estimate:
    the spectrum of a trained matrix is not quite that of noise.

    Args:
        values: top singular values, descending.
        frobenius: norm of the whole matrix.
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
    """A parameter, or a segment of one, as the matrix it multiplies by; None where that cannot be told.

    Of more than two dimensions: (out, in, taps...) as (out, fan_in), and one expert of (1, out, in) as (out, in).
    """
    if p.ndim < 2 or p.numel() == 0 or not p.is_floating_point():
        return None
    if p.ndim == 2:
        return p
    if fan_in is None:
        return None
    if math.prod(p.shape[1:]) == fan_in:
        return p.flatten(1)
    return p[0] if p.ndim == 3 and p.shape[0] == 1 and fan_in in p.shape[1:] else None


class Spectrum:
    """Top singular values of named matrices as they were last measured, with the vectors to measure them from again."""

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        self._measured: dict[
            str, tuple[float, float, float, float, int]
        ] = {}  # top, second, bulk, Frobenius norm, step

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._measured)

    def measure(self, matrices: Mapping[str, Tensor], frobenius: Mapping[str, float], step: int) -> None:
        """Measure anew; of a name that is not there any more, what was known is forgotten."""
        start = [self._vectors.get(name) for name in matrices]
        values, vectors = top_singular_values(list(matrices.values()), start)
        self._vectors, self._measured = {}, {}
        for (name, matrix), vector, row in zip(matrices.items(), vectors, values, strict=True):
            rows, cols = matrix.shape
            if math.isfinite(row[0]):
                self._vectors[name] = vector
            second, bulk = float(row[1]), bulk_edge(row, frobenius[name], rows, cols)
            if min(rows, cols) == 1:
                second = bulk = math.nan
            self._measured[name] = (float(row[0]), second, bulk, frobenius[name], step)

    def columns(self, names: Sequence[str], frobenius: Array) -> dict[str, Array]:
        """`top`, `second`, `bulk` now, and the step they were `calibrated_at`; float64[len(names)], NaN where not known.

        Carried on by the Frobenius norm: top now = top then * |W| now / |W| then, as if the shape of the spectrum had stayed
        (Fan et al. 2510.15262 observe that it does).
        """
        unknown = (math.nan,) * 5
        table = np.array([self._measured.get(name, unknown) for name in names]).reshape(-1, 5)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where(frobenius == table[:, 3], 1.0, frobenius / table[:, 3])
        carried = {name: table[:, j] * factor for j, name in enumerate(("top", "second", "bulk"))}
        return {**carried, "calibrated_at": table[:, 4]}


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices to iterate together: of one shape and device, and not so many that their copy is large."""
    alike: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((*sorted(matrix.shape), matrix.device, matrix.dtype), []).append(i)
    for indices in alike.values():
        most = max(1, BATCH // matrices[indices[0]].numel())
        yield from (indices[i : i + most] for i in range(0, len(indices), most))


def _tall(matrix: Tensor) -> Tensor:
    """[rows, cols], rows >= cols, with the same singular values, in the type to compute in."""
    matrix = matrix.detach()
    tall: Tensor = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    return tall if tall.dtype == torch.float64 else tall.float()


def _start(w: Tensor, vectors: Tensor | None) -> Tensor:
    count = min(VECTORS, w.shape[1])
    if vectors is not None and vectors.shape == (w.shape[1], count):
        return vectors.to(w.device, w.dtype)
    # A generator of its own: a monitor must not change which random numbers the training sees.
    drawn = torch.randn(w.shape[1], count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.to(w.device, w.dtype)


def _iterate(w: Tensor, v: Tensor) -> tuple[Array, Tensor]:
    """(singular values, float64[batch, count], vectors) of w[batch, rows, cols] from v[batch, cols, count]."""
    before: Array | None = None
    for iteration in range(MOST_ITERATIONS + 1):
        y = w @ v
        if iteration % 2 == 0:
            now = _ritz(y)
            least = TOLERANCE * now[:, :2] + NEGLIGIBLE * now[:, :1]
            if before is not None and not (np.abs(now - before)[:, :2] > least).any():
                break
            before = now
        v = torch.linalg.qr(w.mT @ y)[0]
    return now, v


def _ritz(y: Tensor) -> Array:
    """Singular values of y[batch, rows, count], descending: one copy to the host."""
    wide = y.double()
    gram = (wide.mT @ wide).cpu().numpy()
    finite = np.isfinite(gram).all(axis=(1, 2))
    squares = np.linalg.eigvalsh(np.where(finite[:, None, None], gram, 0.0))[:, ::-1]
    values: Array = np.where(finite[:, None], np.sqrt(np.maximum(squares, 0.0)), math.nan)
    return values
