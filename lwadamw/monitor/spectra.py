"""Spectra: the top singular values of all matrices of a run, from one measurement to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from ..state.arrays import Array
from .parts import Part, top_singular_values_of_parts
from .spectrum import bulk_edge, top_singular_values


class Spectrum:
    """Keeps the top singular values of named matrices from their last measurement, and the vectors for the next one."""

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        # top, second and bulk; then the Frobenius norm and the step at which they were measured
        self._measured: dict[str, tuple[float, float, float, float, int]] = {}

    @property
    def known(self) -> bool:
        """Whether any matrix has been measured."""
        return bool(self._measured)

    def measure(self, matrices: Mapping[str, Tensor | Part], frobenius: Mapping[str, float], step: int) -> None:
        """Measure the top singular values of all matrices. What is known about other names is forgotten.

        This is collective if any matrix is split over processes.

        Args:
            matrices: the matrices by name, [rows, cols] each, or what this process holds of them.
            frobenius: the Frobenius norm of each matrix by name.
            step: the step at which the matrices are measured.
        """
        wholes = {name: matrix for name, matrix in matrices.items() if not isinstance(matrix, Part)}
        parts = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, Part)}
        values, vectors = top_singular_values(list(wholes.values()), list(map(self._vectors.get, wholes)))
        if parts:
            more, others = top_singular_values_of_parts(list(parts.values()), list(map(self._vectors.get, parts)))
            values, vectors = np.concatenate([values, more]), vectors + others
        self._vectors, self._measured = {}, {}
        for (name, matrix), vector, row in zip((wholes | parts).items(), vectors, values, strict=True):
            rows, cols = matrix.shape
            if math.isfinite(row[0]):
                self._vectors[name] = vector
            second, bulk = float(row[1]), bulk_edge(row, frobenius[name], rows, cols)
            if min(rows, cols) == 1:
                second = bulk = math.nan
            self._measured[name] = (float(row[0]), second, bulk, frobenius[name], step)

    def columns(self, names: Sequence[str], frobenius: Array) -> dict[str, Array]:
        """Return the present `top`, `second` and `bulk`, and the step `calibrated_at` at which they were measured.

        Since the measurement they follow the Frobenius norm: top now = top then * |W| now / |W| then. This assumes that the
        shape of the spectrum stays the same, as Fan et al. 2510.15262 observe.

        Args:
            names: the names to return values for.
            frobenius: the present Frobenius norm for each name, float64[len(names)].

        Returns:
            The columns by name, float64[len(names)] each. NaN for names that were not measured.
        """
        unknown = (math.nan,) * 5
        table = np.array([self._measured.get(name, unknown) for name in names]).reshape(-1, 5)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where(frobenius == table[:, 3], 1.0, frobenius / table[:, 3])
        carried = {name: table[:, j] * factor for j, name in enumerate(("top", "second", "bulk"))}
        return {**carried, "calibrated_at": table[:, 4]}
