"""Thresholds: the device tables from which the huber thresholds of a plan follow the weights after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..state import decay
from .launch import Launch


class Thresholds:
    """The thresholds of all rows of a plan with huber decay. state/decay.py has the formula and its source.

    Args:
        factors: for each row, the number that turns its sum of |w| into the threshold for weights that do not change:
            huber_scale / number of elements of the whole parameter.
        addresses: int64[n_rows], address of each row's threshold, a float32[].
        coefficients: float32[n_rows, COEFFICIENTS]; the column ACTIVE says which rows took the step.
        chunk_row: int32[n_chunks], the row of each chunk.
        options: options of Triton's compiler.
        split: other processes hold other parts of the rows. Then the sums of all processes have to be added up between two
            launches.

    Attributes:
        tables: the tensors that the kernel reads and writes.
        split: as given.
        totals: float64[n_rows], sum of |w| of each row: of this process's part, then of the whole. Used if `split`.
    """

    def __init__(
        self,
        factors: Sequence[float],
        addresses: Tensor,
        coefficients: Tensor,
        chunk_row: Tensor,
        options: Mapping[str, Any],
        split: bool = False,
    ) -> None:
        device = coefficients.device
        # float32[n_chunks]: sum of |w| of each chunk; the update kernel writes them. They start as zeros, because the
        # update kernel writes nothing for a row without elements or for a row that has not taken a step.
        self.absolutes = torch.zeros(max(len(chunk_row), 1), dtype=torch.float32, device=device)
        first_chunk = torch.searchsorted(
            chunk_row, torch.arange(len(factors) + 1, device=device, dtype=chunk_row.dtype)
        )
        self.tables = (
            self.absolutes,
            first_chunk.to(torch.int32),
            torch.tensor(factors, dtype=torch.float64, device=device),
            addresses,
            coefficients,
            torch.zeros(len(factors), dtype=torch.float64, device=device),
        )
        self.split, self.totals, self._options = split, self.tables[-1], options

    def launch(self, first: int, n_rows: int) -> Launch:
        """Return the launch that moves the thresholds of some rows, to be called after the update of these rows.

        Args:
            first: index of the first row.
            n_rows: number of rows.
        """
        constants = {"RATE": decay.RATE, "SPLIT": self.split}
        return Launch(kernels.threshold_kernel, n_rows, (*self.tables, first), constants, self._options)

    def launch_totals(self) -> Launch:
        """Return the launch that writes the sums of this process's parts to `totals`, to be called after the update."""
        arguments = (*self.tables[:2], self.totals)
        return Launch(kernels.absolute_kernel, len(self.totals), arguments, {}, self._options)
