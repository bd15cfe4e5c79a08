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

Nothing at all happens, t included, when found_inf is set or |g| is to be clipped and is not finite.
"""

from __future__ import annotations

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
    d = -eta * decay * p.value - eta * u
    before, p.value = p.value, p.value + d
    return StepNorms(
        float(np.linalg.norm(p.value)), float(np.linalg.norm(d)), float(np.linalg.norm(g)), angle(before, d)
    )


def angle(before: Array, change: Array) -> float:
    """Angle in radians between `before` and `before + change`, exact for small ones where the arc cosine is not."""
    b, d, bd = (before**2).sum(), (change**2).sum(), (before * change).sum()
    return float(np.arctan2(np.sqrt(max(b * d - bd**2, 0.0)), b + bd))
