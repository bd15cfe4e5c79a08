"""The steady state of AdamW: the size of weights and updates after many steps of noise gradients, and the time until then.

The derivations are in docs/steady_state.md.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any, Final

import numpy as np

from ..state.arrays import Array

# After 3 tau a matrix keeps e^-3, so 5 %, of its initial weights. Initial weights are often 2 to 4 times larger than
# the steady state. After 2 tau what remains of them would still add a tenth to the norm. After 3 tau it does not.
STEADY_TAUS: Final = 3


def tau_of(lr: Any, weight_decay: Any) -> Any:
    """Return tau = 1/(lr weight_decay): the number of steps in which weights shrink by a factor e without updates.

    Args:
        lr: effective learning rate, a float or an array.
        weight_decay: effective weight decay, a float or an array of the same shape.

    Returns:
        tau in steps, a float or an array of the same shape.
    """
    return 1 / (lr * weight_decay)


def weight_rms_of(lr: Any, weight_decay: Any) -> Any:
    """Return the root mean square of the weights at steady state, sqrt(lr / 2 weight_decay).

    Source: Kosson et al. 2305.17212 and 2510.19093.

    Args:
        lr: effective learning rate, a float or an array.
        weight_decay: effective weight decay, a float or an array of the same shape.

    Returns:
        The RMS, a float or an array of the same shape.
    """
    return (lr / (2 * weight_decay)) ** 0.5


def relative_update_of(lr: Any, weight_decay: Any, beta1: Any) -> Any:
    """Return the relative update at steady state, sqrt(2 lr weight_decay (1 - beta1)/(1 + beta1)).

    The relative update is the norm of the update divided by the norm of the weight. It is also the angle in radians by which
    a weight turns in one step. Source: Kosson et al. 2305.17212.

    Args:
        lr: effective learning rate, a float or an array.
        weight_decay: effective weight decay, a float or an array of the same shape.
        beta1: decay rate of the first moment, a float or an array of the same shape.

    Returns:
        The relative update, a float or an array of the same shape.
    """
    return (2 * lr * weight_decay * (1 - beta1) / (1 + beta1)) ** 0.5


def next_mean_square(mean_square: float, lr: float, weight_decay: float) -> float:
    """Return the mean square of weights after one more step, as Kosson et al. 2510.19093 model it (the model of Eq. 11).

    With kept = (1 - lr weight_decay)^2 the model is

        mean_square <- kept mean_square + (1 - kept) lr / (2 weight_decay)

    Its fixed point is the square of `weight_rms_of`. Without weight decay it adds lr^2 per step. `Elapsed` is another model: it
    includes momentum, and without momentum it adds lr^2 per step at any weight decay.

    Args:
        mean_square: mean of the squared weights before the step.
        lr: effective learning rate of the step.
        weight_decay: effective weight decay of the step; it may be 0.
    """
    kept = (1 - lr * weight_decay) ** 2
    # (1 - kept) lr / (2 weight_decay), written so that weight_decay = 0 does not divide by 0.
    return kept * mean_square + lr**2 * (1 - lr * weight_decay / 2)


@dataclass(frozen=True, slots=True)
class SteadyState:
    """The steady state of a matrix whose gradients are noise, under constant hyperparameters.

    Args:
        lr: effective learning rate.
        weight_decay: effective weight decay.
        beta1: decay rate of the first moment.

    Examples:
        >>> steady = SteadyState(lr=1e-3, weight_decay=0.1, beta1=0.9)
        >>> round(steady.tau), round(steady.weight_rms, 4), round(steady.relative_update, 5)
        (10000, 0.0707, 0.00324)
    """

    lr: float
    weight_decay: float
    beta1: float

    @property
    def tau(self) -> float:
        """tau = 1/(lr weight_decay) in steps: after tau steps the initial weights have shrunk by a factor e."""
        return float(tau_of(self.lr, self.weight_decay))

    @property
    def weight_rms(self) -> float:
        """Root mean square of the weights, sqrt(lr / 2 weight_decay).

        The formula holds where tau is much longer than the memory of the momentum, 1/(1 - beta1) steps. Where tau is only 10
        times as long, the formula is 4 % too large.
        """
        return float(weight_rms_of(self.lr, self.weight_decay))

    @property
    def relative_update(self) -> float:
        """Norm of the update over norm of the weight; also radians per step (Kosson et al. 2305.17212)."""
        return float(relative_update_of(self.lr, self.weight_decay, self.beta1))


@dataclass(slots=True)
class Elapsed:
    """What the steps so far have done to the weights of one group if gradients are noise, under any schedule.

    Four numbers on the host follow the mean squares exactly, with momentum. docs/steady_state.md has the recurrence, its
    derivation and what it leaves out.

    Attributes:
        taus: number of tau that have passed, the sum of lr weight_decay over the steps.
        log_kept: natural logarithm of the share of the initial mean square that is left.
        grown: mean square that weights would have now if they had started at zero.
        cross: mean of the product of a weight and its update u, where u is the update before it is multiplied by lr.
    """

    taus: float = 0.0
    log_kept: float = 0.0
    grown: float = 0.0
    cross: float = 0.0

    def advance(self, lr: float, weight_decay: float, beta1: float) -> None:
        """Take account of one step.

        Args:
            lr: effective learning rate of the step.
            weight_decay: effective weight decay of the step.
            beta1: decay rate of the first moment.
        """
        rate, unit = lr * weight_decay, (1 - beta1) / (1 + beta1)
        kept = 1 - rate
        self.taus += rate
        self.log_kept += 2 * math.log(max(abs(kept), 1e-300))
        self.grown = kept * kept * self.grown - 2 * kept * beta1 * lr * self.cross + lr * lr * unit
        self.cross = kept * beta1 * self.cross - lr * unit

    def back_to(self, earlier: Elapsed, share: float) -> None:
        """Undo a share of the steps since an earlier time, because these steps turned out to be skipped steps.

        All four numbers move towards their earlier values by this share of the difference.

        Args:
            earlier: a copy of this object from before those steps.
            share: skipped steps divided by all steps since then, from 0 to 1.
        """
        now, then = astuple(self), astuple(earlier)
        self.taus, self.log_kept, self.grown, self.cross = (n + share * (t - n) for n, t in zip(now, then, strict=True))


def earliest_steady_step(step: int, taus: Array, rate: Array, slope: Array) -> Array:
    """Return the first step at which STEADY_TAUS tau can have passed.

    The prediction assumes that lr weight_decay goes on to rise by the same amount per step, or stays as it is where it does not
    rise now. So the result is a lower bound for every schedule that does not rise faster later than it rises now.

    Args:
        step: number of the present step.
        taus: number of tau that have passed so far, float64[n].
        rate: lr weight_decay of the present step, float64[n].
        slope: change of lr weight_decay per step, float64[n]; 0 or less means that the rate stays.

    Returns:
        Numbers of steps, float64[n]; infinity where STEADY_TAUS tau never pass.
    """
    left = np.maximum(STEADY_TAUS - taus, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        rising = (np.sqrt(rate**2 + 2 * np.maximum(slope, 0.0) * left) - rate) / slope
        steps = np.where(slope > 0, rising, np.where(left > 0, left / rate, 0.0))
    bound: Array = step + np.ceil(steps)
    return bound
