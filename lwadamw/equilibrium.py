"""Where AdamW takes weights whose gradients are noise, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Where AdamW takes a matrix whose gradients are noise, by its effective lr and weight decay."""

    lr: float
    weight_decay: float
    beta1: float

    @property
    def tau(self) -> float:
        """Steps in which the weights forget a factor e of what they were."""
        return 1 / (self.lr * self.weight_decay)

    @property
    def weight_rms(self) -> float:
        return math.sqrt(self.lr / (2 * self.weight_decay))

    @property
    def relative_update(self) -> float:
        """Norm of the update over norm of the weight (Kosson et al. 2305.17212)."""
        return math.sqrt(2 * self.lr * self.weight_decay * (1 - self.beta1) / (1 + self.beta1))
