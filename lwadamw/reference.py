r"""The whole algorithm in NumPy float64. Every backend is tested against it.

One step of AdamW (Loshchilov & Hutter 1711.05101), in the form of torch.optim.AdamW, where the learning rate multiplies the
weight decay. It includes width scaling, clipping by the global norm, and the norms of the step. For each parameter p, its
gradient g, its moments m and v and its number of steps t:

    eta, lambda, epsilon   lr, weight_decay and eps: the base value of the group times its width multiplier
    s                      grad_scale, the loss scale
    |g|                    norm over the gradients of all parameters, divided by s
    c                      min(1, max_grad_norm / (|g| + 1e-6)), or 1 where max_grad_norm is None

    g <- c g / s                      with maximize: g <- -c g / s
    t <- t + 1
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    x = v                             with amsgrad: the elementwise maximum of v over all steps so far
    u = (m / (1 - beta1^t)) / (sqrt(x) / sqrt(1 - beta2^t) + epsilon)
    p <- p - decay_per_step p - eta u

decay_per_step follows the decay law of the group, where lr and peak_lr are base values:

    coupled       eta lambda
    independent   eta lambda / peak_lr               Wortsman et al. 2309.14322
    corrected     eta lambda lr / peak_lr            AdamC, Defazio 2506.02285
    huber         eta lambda                         AdamHuberDecay, Guo & Fan 2511.14721

With the law huber the last line is another one. The update comes first, then the proximal map of the Huber function:

    p <- p - eta u
    p <- p / (1 + decay_per_step)              where |p| <= (1 + decay_per_step) delta
         p - decay_per_step delta sign(p)      elsewhere
    delta <- 0.99 delta + 0.01 huber_scale mean |p|

Before the first step delta is huber_scale mean |p|. There is one delta for each parameter.

If found_inf is set, or if max_grad_norm is set and |g| is not finite, the step is skipped: it changes nothing, not even t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Group:
    """Hyperparameters of some parameters. The names are torch's; the base values are kept apart from the width multipliers.

    Attributes:
        lr: base learning rate.
        betas: decay rates of the first and the second moment.
        eps: base epsilon.
        weight_decay: base weight decay.
        amsgrad: divide by the maximum of the second moment over all steps so far.
        maximize: follow the gradient uphill.
        decay: decay law: "coupled", "independent", "corrected" or "huber".
        peak_lr: highest base learning rate of the schedule, by which "independent" and "corrected" divide.
        huber_scale: threshold of "huber" over the mean of |p|.
        width_lr_mult: width multiplier of lr.
        width_wd_mult: width multiplier of weight_decay.
        width_eps_mult: width multiplier of eps.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    decay: str = "coupled"
    peak_lr: float | None = None
    huber_scale: float = 1.0
    width_lr_mult: float = 1.0
    width_wd_mult: float = 1.0
    width_eps_mult: float = 1.0


@dataclass
class Parameter:
    """A parameter and its optimizer state.

    Attributes:
        value: the weights, of any shape.
        group: hyperparameters, shared with other parameters or not.
        step: number of steps taken.
        exp_avg: first moment, of the shape of `value`; None before the first step.
        exp_avg_sq: second moment, of the shape of `value`; None before the first step.
        max_exp_avg_sq: maximum of the second moment over all steps so far; None without amsgrad.
        huber_threshold: delta of the law "huber"; None with another law, and before the first step.
    """

    value: Array
    group: Group = field(default_factory=Group)
    step: int = 0
    exp_avg: Array | None = None
    exp_avg_sq: Array | None = None
    max_exp_avg_sq: Array | None = None
    huber_threshold: float | None = None


class StepNorms(NamedTuple):
    """Norms of one step of one parameter.

    Attributes:
        weight: Frobenius norm of the weight after the step.
        update: Frobenius norm of the weight after the step minus the weight before it, so with the decay.
        grad: Frobenius norm of the gradient, unscaled and clipped.
        angle: angle in radians between the weight before and the weight after the step.
    """

    weight: float
    update: float
    grad: float
    angle: float


def global_norm(gradients: Sequence[Array | None]) -> float:
    """Return the Frobenius norm over all gradients together. None stands for a parameter without a gradient."""
    return float(np.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None)))


def step(
    parameters: Sequence[Parameter],
    gradients: Sequence[Array | None],
    *,
    max_grad_norm: float | None = None,
    grad_scale: float = 1.0,
    found_inf: bool = False,
) -> list[StepNorms | None]:
    """Take one step, in place.

    Args:
        parameters: the parameters.
        gradients: for each parameter, a gradient of its shape. A parameter with None stays as it is.
        max_grad_norm: largest global norm of the gradients; None: no clipping.
        grad_scale: loss scale, by which the gradients are divided first.
        found_inf: whether to skip the step.

    Returns:
        The norms of each parameter; None for a parameter that stayed as it is.
    """
    factor = 1.0 / grad_scale
    if max_grad_norm is not None:
        norm = global_norm(gradients) / grad_scale
        found_inf = found_inf or not np.isfinite(norm)
        factor *= min(1.0, max_grad_norm / (norm + 1e-6))
    if found_inf:
        return [None] * len(parameters)
    return [None if g is None else _update(p, factor * g) for p, g in zip(parameters, gradients, strict=True)]


def _update(p: Parameter, g: Array) -> StepNorms:
    beta1, beta2 = p.group.betas
    eta = p.group.lr * p.group.width_lr_mult
    decay = p.group.weight_decay * p.group.width_wd_mult
    eps = p.group.eps * p.group.width_eps_mult
    if p.group.maximize:
        g = -g
    zeros = np.zeros_like(p.value)

    p.step += 1
    p.exp_avg = beta1 * (zeros if p.exp_avg is None else p.exp_avg) + (1 - beta1) * g
    p.exp_avg_sq = beta2 * (zeros if p.exp_avg_sq is None else p.exp_avg_sq) + (1 - beta2) * g**2
    second = p.exp_avg_sq
    if p.group.amsgrad:
        second = np.maximum(zeros if p.max_exp_avg_sq is None else p.max_exp_avg_sq, p.exp_avg_sq)
        p.max_exp_avg_sq = second

    mean = p.exp_avg / (1 - beta1**p.step)
    u = mean / (np.sqrt(second) / np.sqrt(1 - beta2**p.step) + eps)
    if p.group.decay == "huber":
        d = _huber_update(p, eta * decay, -eta * u)
    else:
        d = -_decay_per_step(p.group, eta * decay) * p.value - eta * u
    before, p.value = p.value, p.value + d
    return StepNorms(
        float(np.linalg.norm(p.value)), float(np.linalg.norm(d)), float(np.linalg.norm(g)), angle(before, d)
    )


def _decay_per_step(group: Group, coupled: float) -> float:
    """Return what the decay law makes of eta lambda. A law that lacks its peak_lr gives NaN."""
    if group.decay == "independent":
        return coupled / (group.peak_lr or math.nan)
    if group.decay == "corrected":
        return coupled * group.lr / (group.peak_lr or math.nan)
    return coupled


def _huber_update(p: Parameter, decay_per_step: float, update: Array) -> Array:
    """Return the change of a parameter, including its decay, and move its threshold."""

    def mean(value: Array) -> float:
        return p.group.huber_scale * float(np.abs(value).sum()) / max(value.size, 1)

    if p.huber_threshold is None:
        p.huber_threshold = mean(p.value)
    delta, moved = p.huber_threshold, p.value + update
    shrunk, lowered = moved / (1 + decay_per_step), moved - decay_per_step * delta * np.sign(moved)
    after = np.where(np.abs(moved) <= (1 + decay_per_step) * delta, shrunk, lowered)
    p.huber_threshold = 0.99 * delta + 0.01 * mean(after)
    return np.asarray(after - p.value)


def angle(before: Array, change: Array) -> float:
    """Return the angle in radians between `before` and `before + change`.

    The arc tangent is exact for small angles. The arc cosine of the normalised scalar product is not.
    """
    b, d, bd = (before**2).sum(), (change**2).sum(), (before * change).sum()
    return float(np.arctan2(np.sqrt(max(b * d - bd**2, 0.0)), b + bd))
