r"""The whole algorithm in NumPy float64: the ground truth every backend is tested against.

One step of AdamW (Loshchilov & Hutter 1711.05101, in the form of torch.optim.AdamW, where the decay is multiplied
by the learning rate), with layerwise width scaling, clipping by the global norm, and the norms of the step:

    eta, lambda, epsilon   base value of the group times its width multiplier
    c = min(1, max_grad_norm / (|g| + 1e-6))       |g| over every gradient, after unscaling
    g <- +-c g / s                                 - to maximize, s the loss scale
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2                 x = max over time of v with amsgrad, else v
    u = (m / (1 - beta1^t)) / (sqrt(x) / sqrt(1 - beta2^t) + epsilon)
    d = -eta lambda p - eta u
    p <- p + d

The decay eta lambda is that of decay="coupled". With the base values lr and peak_lr, and the prox of the Huber function:

    independent            eta lambda / peak_lr                  (Wortsman et al. 2309.14322)
    corrected              eta lambda lr / peak_lr               (AdamC, Defazio 2506.02285)
    huber                  p <- p - eta u                        (AdamHuberDecay, Guo & Fan 2511.14721)
        tau = eta lambda   p <- p / (1 + tau) where |p| <= (1 + tau) delta, else p - tau delta sign(p)
                           delta <- 0.99 delta + 0.01 huber_scale mean |p|, from huber_scale mean |p| before the first step

Nothing at all happens, t included, when found_inf is set or |g| is to be clipped and is not finite.
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
    """Hyperparameters shared by some parameters, in torch's words; base values and width multipliers apart."""

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
    """A weight of any shape and its optimizer state."""

    value: Array
    group: Group = field(default_factory=Group)
    step: int = 0
    exp_avg: Array | None = None
    exp_avg_sq: Array | None = None
    max_exp_avg_sq: Array | None = None
    huber_threshold: float | None = None


class StepNorms(NamedTuple):
    """Frobenius norms of one parameter's step; angle in radians between the weight before and after."""

    weight: float
    update: float
    grad: float
    angle: float


def global_norm(gradients: Sequence[Array | None]) -> float:
    return float(np.sqrt(sum(float((g**2).sum()) for g in gradients if g is not None)))


def step(
    parameters: Sequence[Parameter],
    gradients: Sequence[Array | None],  # one per parameter, of its shape; None: left alone
    *,
    max_grad_norm: float | None = None,
    grad_scale: float = 1.0,
    found_inf: bool = False,
) -> list[StepNorms | None]:
    """Take one step in place; the norms of each parameter that took it."""
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

    corrected = p.exp_avg / (1 - beta1**p.step)
    u = corrected / (np.sqrt(second) / np.sqrt(1 - beta2**p.step) + eps)
    d = -_shrinkage(p.group, eta * decay) * p.value - eta * u
    if p.group.decay == "huber":
        d = _huber_update(p, eta * decay, -eta * u)
    before, p.value = p.value, p.value + d
    return StepNorms(
        float(np.linalg.norm(p.value)), float(np.linalg.norm(d)), float(np.linalg.norm(g)), angle(before, d)
    )


def _shrinkage(group: Group, decay: float) -> float:
    if group.decay == "independent":
        return decay / (group.peak_lr or math.nan)
    if group.decay == "corrected":
        return decay * group.lr / (group.peak_lr or math.nan)
    return decay


def _huber_update(p: Parameter, tau: float, update: Array) -> Array:
    """The change of a parameter, decay included; moves its threshold."""

    def mean(value: Array) -> float:
        return p.group.huber_scale * float(np.abs(value).sum()) / max(value.size, 1)

    if p.huber_threshold is None:
        p.huber_threshold = mean(p.value)
    delta, moved = p.huber_threshold, p.value + update
    after = np.where(np.abs(moved) <= (1 + tau) * delta, moved / (1 + tau), moved - tau * delta * np.sign(moved))
    p.huber_threshold = 0.99 * delta + 0.01 * mean(after)
    return np.asarray(after - p.value)


def angle(before: Array, change: Array) -> float:
    """Angle in radians between `before` and `before + change`, exact for small ones where the arc cosine is not."""
    b, d, bd = (before**2).sum(), (change**2).sum(), (before * change).sum()
    return float(np.arctan2(np.sqrt(max(b * d - bd**2, 0.0)), b + bd))
