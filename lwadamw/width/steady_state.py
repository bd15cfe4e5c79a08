"""Where AdamW takes weights whose gradients are noise, and how fast."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any, Final

import numpy as np

from ..state.arrays import Array

# After this many tau a matrix keeps e^-3, 5 %, of its initial weights. Where those start 2 to 4 times larger than the
# steady state, after 2 tau their remains would still add a tenth to the norm, and after 3 they do not.
STEADY_TAUS: Final = 3


def tau_of(lr: Any, weight_decay: Any) -> Any:
    """Return tau = 1/(lr weight_decay) in steps, from effective values: floats, or arrays of one shape."""
    return 1 / (lr * weight_decay)


def weight_rms_of(lr: Any, weight_decay: Any) -> Any:
    """Return the steady weight RMS sqrt(lr / 2 weight_decay), from effective values: floats, or arrays of one shape.

    Source: Kosson et al. 2305.17212 and 2510.19093.
    """
    return (lr / (2 * weight_decay)) ** 0.5


def relative_update_of(lr: Any, weight_decay: Any, beta1: Any) -> Any:
    """Return the steady relative update sqrt(2 lr weight_decay (1 - beta1)/(1 + beta1)).

    It is the norm of the update over the norm of the weight, and the angle in radians by which a weight turns in a step.
    Takes effective values: floats, or arrays of one shape. Source: Kosson et al. 2305.17212.
    """
    return (2 * lr * weight_decay * (1 - beta1) / (1 + beta1)) ** 0.5


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Where AdamW takes a matrix whose gradients are noise, by its effective lr and weight decay."""

    lr: float
    weight_decay: float
    beta1: float

    @property
    def tau(self) -> float:
        """Steps in which the weights forget a factor e of what they were."""
        return float(tau_of(self.lr, self.weight_decay))

    @property
    def weight_rms(self) -> float:
        """RMS of the weights where tau is long against momentum, 1/(1 - beta1) steps; 4 % too large where 10 times as long."""
        return float(weight_rms_of(self.lr, self.weight_decay))

    @property
    def relative_update(self) -> float:
        """Norm of the update over norm of the weight, and radians the weight turns by in a step (Kosson et al. 2305.17212)."""
        return float(relative_update_of(self.lr, self.weight_decay, self.beta1))


@dataclass(slots=True)
class Elapsed:
    """What the steps so far have done to the weights of one group, if gradients are noise: host arithmetic under any schedule.

    With u the update before the learning rate, an exponential average of white noise scaled to variance
    U = (1 - beta1)/(1 + beta1), and a = 1 - lr wd, the mean squares of weights follow exactly

        w^2 <- a^2 w^2 - 2 a beta1 lr <w u> + lr^2 U          <w u> <- a beta1 <w u> - lr U

    which comes to a^2 w^2 + lr^2 per step once tau is long against momentum. Not in it: the correlation of u with its own
    denominator, which takes 1 to 2 % off the RMS at beta2 0.95, and less at more.
    """

    taus: float = 0.0  # sum of lr wd
    log_kept: float = 0.0  # log of the share of w^2 that is left of the weights at the start
    grown: float = 0.0  # w^2 of weights that started at zero
    cross: float = 0.0  # <w u>

    def advance(self, lr: float, weight_decay: float, beta1: float) -> None:
        """One step with these effective values."""
        rate, unit = lr * weight_decay, (1 - beta1) / (1 + beta1)
        kept = 1 - rate
        self.taus += rate
        self.log_kept += 2 * math.log(max(abs(kept), 1e-300))
        self.grown = kept * kept * self.grown - 2 * kept * beta1 * lr * self.cross + lr * lr * unit
        self.cross = kept * beta1 * self.cross - lr * unit

    def back_to(self, earlier: Elapsed, share: float) -> None:
        """Take a share of what happened since `earlier` back: that of the steps which turn out not to have happened."""
        now, then = astuple(self), astuple(earlier)
        self.taus, self.log_kept, self.grown, self.cross = (n + share * (t - n) for n, t in zip(now, then, strict=True))


def earliest_steady_step(step: int, taus: Array, rate: Array, slope: Array) -> Array:
    """The step at which `taus` reach STEADY_TAUS if lr wd stays, or while it rises keeps rising; inf: never.

    A lower bound, then, for any schedule that does not rise faster later than it does now.

    Args:
        step: the present one.
        taus: elapsed so far, float64[n].
        rate: lr wd of the present step, float64[n].
        slope: by how much that rises per step, float64[n]; 0 or less counts as staying.
    """
    left = np.maximum(STEADY_TAUS - taus, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rising = (np.sqrt(rate**2 + 2 * np.maximum(slope, 0.0) * left) - rate) / slope
        steps = np.where(slope > 0, rising, np.where(left > 0, left / rate, 0.0))
    bound: Array = step + np.ceil(steps)
    return bound
