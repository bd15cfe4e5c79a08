"""Device totals: the numbers that all plans of one device share."""

from __future__ import annotations

import torch
from torch import Tensor

from .stream_order import StreamOrder


class DeviceTotals:
    """The square sums that make up the global gradient norm, the norm itself, and the number of skipped steps.

    `order` makes steps on different streams of the device use all tables one after the other.

    Args:
        device: where the plans are.
        n_sums: number of square sums that are added up: one per plan on any device, and one for the torch backend.
        skipped: int64[] on `device`, number of steps skipped so far. The kernels add to this tensor.
    """

    def __init__(self, device: torch.device, n_sums: int, skipped: Tensor) -> None:
        self.square_sums = torch.zeros(n_sums, dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped = skipped
        self.order = StreamOrder(device)
        self.order.add((self.square_sums, self.grad_norm, self.skipped))
