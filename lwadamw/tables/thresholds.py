"""Thresholds: the tables from which a plan's huber thresholds follow its weights, on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..state import decay
from .launch import Launch


class Thresholds:
    """For rows of one device, each with a threshold in its state.

    Args:
        factors: what turns each row's sum of |w| into its threshold for weights that stay as they are
        addresses: int64[n_rows] of the thresholds
        coefficients: float32[n_rows, COEFFICIENTS], which say what rows took the step
    """

    def __init__(
        self,
        factors: Sequence[float],
        addresses: Tensor,
        coefficients: Tensor,
        chunk_row: Tensor,
        options: Mapping[str, Any],
    ) -> None:
        device = coefficients.device
        # Zeros: rows that are empty or have not taken a step leave none of their own.
        self.absolutes = torch.zeros(max(len(chunk_row), 1), dtype=torch.float32, device=device)
        ends = torch.searchsorted(chunk_row, torch.arange(len(factors) + 1, device=device, dtype=chunk_row.dtype))
        self._tables = (
            self.absolutes,
            ends.to(torch.int32),
            torch.tensor(factors, dtype=torch.float64, device=device),
            addresses,
            coefficients,
        )
        self._options = options

    def launch(self, first: int, rows: int) -> Launch:
        """Of the kernel that moves the thresholds of some rows after their step."""
        constants = {"RATE": decay.RATE}
        return Launch(kernels.threshold_kernel, rows, (*self._tables, first), constants, self._options)
