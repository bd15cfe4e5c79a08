"""Spectra: the top singular values of all matrices of a run, from one measurement to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..state.arrays import Array
from .parts import Part, top_singular_values_of_parts
from .spectrum import bulk_edge, top_singular_values


class _Measured(NamedTuple):
    """What was measured of a name: its values, its Frobenius norm and the step at that time, and which matrix of a pack."""

    top: float
    second: float
    bulk: float
    frobenius: float
    step: float
    top_of: float


class Spectrum:
    """Keeps the top singular values of named matrices from their last measurement, and the vectors for the next one."""

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        self._measured: dict[str, _Measured] = {}

    @property
    def known(self) -> bool:
        """Whether any matrix has been measured."""
        return bool(self._measured)

    def measure(self, matrices: Mapping[str, Tensor | Part], frobenius: Mapping[str, float], step: int) -> None:
        """Measure the top singular values of all matrices. What is known about other names is forgotten.

        This is collective if any matrix is split over processes.

        Args:
            matrices: the matrices by name, [rows, cols] each, or what this process holds of them; or several matrices of one
                parameter, [matrices, rows, cols]. Its values are then those of the matrix with the largest singular value.
            frobenius: the Frobenius norm of each matrix, or of each pack of matrices, by name.
            step: the step at which the matrices are measured.
        """
        parts = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, Part)}
        packs = {n: m for n, m in matrices.items() if isinstance(m, Tensor) and m.ndim == 3}
        wholes = {n: m for n, m in matrices.items() if isinstance(m, Tensor) and m.ndim == 2}
        own = {name: frobenius[name] for name in (*wholes, *parts)}
        for name, pack in packs.items():
            members = [f"{name}[{i}]" for i in range(len(pack))]
            norms = torch.linalg.vector_norm(pack, dim=(1, 2), dtype=torch.float64).tolist()
            wholes |= dict(zip(members, pack.unbind(), strict=True))
            own |= dict(zip(members, norms, strict=True))
        values, vectors = top_singular_values(list(wholes.values()), list(map(self._vectors.get, wholes)))
        if parts:
            more, others = top_singular_values_of_parts(list(parts.values()), list(map(self._vectors.get, parts)))
            values, vectors = np.concatenate([values, more]), vectors + others
        self._vectors = {}
        found: dict[str, _Measured] = {}
        for (name, matrix), vector, row in zip((wholes | parts).items(), vectors, values, strict=True):
            rows, cols = matrix.shape
            if math.isfinite(row[0]):
                self._vectors[name] = vector
            second, bulk = float(row[1]), bulk_edge(row, own[name], rows, cols)
            if min(rows, cols) == 1:
                second = bulk = math.nan
            found[name] = _Measured(float(row[0]), second, bulk, own[name], step, math.nan)
        for name, pack in packs.items():
            each = [found.pop(f"{name}[{i}]") for i in range(len(pack))]
            worst = int(np.argmax([one.top for one in each]))  # NaN counts as the largest
            found[name] = each[worst]._replace(frobenius=frobenius[name], top_of=worst)
        self._measured = found

    def columns(self, names: Sequence[str], frobenius: Array) -> dict[str, Array]:
        """Return the present `top`, `second` and `bulk`, and the step `calibrated_at` at which they were measured.

        Since the measurement they follow the Frobenius norm: top now = top then * |W| now / |W| then. This assumes that the
        shape of the spectrum stays the same, as Fan et al. 2510.15262 observe.

        Args:
            names: the names to return values for.
            frobenius: the present Frobenius norm for each name, float64[len(names)].

        Returns:
            The columns by name, float64[len(names)] each. NaN for names that were not measured. If some parameter packs several
            matrices, there is a column `top_of`, the index of the matrix that the values are of.
        """
        unknown = _Measured(*(math.nan,) * 6)
        table = np.array([self._measured.get(name, unknown) for name in names]).reshape(-1, 6)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where(frobenius == table[:, 3], 1.0, frobenius / table[:, 3])
        carried = {name: table[:, j] * factor for j, name in enumerate(("top", "second", "bulk"))}
        packed = {} if np.isnan(table[:, 5]).all() else {"top_of": table[:, 5]}
        return {**carried, "calibrated_at": table[:, 4], **packed}
