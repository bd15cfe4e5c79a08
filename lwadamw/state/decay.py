"""Decay laws: what weight decay takes from a weight in one step.

With lr the group's own value, eta = lr x width multipliers, lambda = weight_decay x width multiplier:

    coupled       w <- (1 - eta lambda) w                   torch.optim.AdamW
    independent   w <- (1 - eta lambda / peak_lr) w         Wortsman et al. 2309.14322: follows the schedule, not the peak
    corrected     w <- (1 - eta lambda lr / peak_lr) w      AdamC, Defazio 2506.02285
    huber         w <- prox of eta lambda R_delta (w)       AdamHuberDecay, Guo & Fan 2511.14721

Each is the coupled law of another weight_decay, except for huber, which is no multiple of w: see kernels/huber.py. Its
delta, one per parameter, is how the paper describes it, a moving average of |w|; its constants are not known to us. Here

    delta <- delta + RATE (huber_scale mean |w| - delta)    after every step, from huber_scale mean |w| before the first
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from . import keys

LAWS: Final = keys.DECAY.values
PEAKED: Final = ("independent", "corrected")  # those that divide by the highest learning rate
THRESHOLD: Final = "huber_threshold"  # key of delta in a parameter's state, float32[]
RATE: Final = 0.01


def law_of(group: Mapping[str, Any], where: str = "") -> str:
    """The law of a group; coupled where it says nothing.

    Raises:
        ValueError: there is no such law.
    """
    law = keys.DECAY.of(group)
    if law not in LAWS:
        raise ValueError(f"{where}decay={law!r} is not one of {', '.join(map(repr, LAWS))}.")
    return law


def is_huber(group: Mapping[str, Any]) -> bool:
    return keys.DECAY.of(group) == "huber"


def per_lr(group: Mapping[str, Any], where: str = "") -> float | Tensor:
    """What weight_decay is multiplied with so that the coupled law decays as the group's does; 1 for huber's decay per step.

    Raises:
        ValueError: there is no such law, or its peak_lr is not a positive number.
    """
    law = law_of(group, where)
    if law not in PEAKED:
        return 1.0
    peak = keys.PEAK_LR.of(group)
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not (math.isfinite(peak) and peak > 0):
        raise ValueError(
            f"{where}peak_lr={peak!r} is not a positive number, and decay={law!r} divides by it. Give peak_lr=..., the "
            "highest learning rate of the schedule, to AdamW or in the group."
        )
    lr: float | Tensor = group["lr"]
    return 1 / peak if law == "independent" else lr / peak


def complete_law(group: dict[str, Any], where: str) -> None:
    """Check the law of a new group, and give it a peak_lr if it needs one and has none.

    Raises:
        ValueError: unknown law, a value that is not valid, or parameters and flags that the law excludes.
    """
    law = law_of(group, where)
    if law == "coupled":
        group.pop(keys.DECAY.name, None)  # so that its checkpoints are torch's
    if law in PEAKED and keys.PEAK_LR.of(group) is None:
        # A scheduler that is there already has changed lr, and kept what it was.
        group[keys.PEAK_LR.name] = float(group.get("initial_lr", group["lr"]))
    per_lr(group, where)
    if law != "huber":
        return
    scale = group.setdefault(keys.HUBER_SCALE.name, keys.HUBER_SCALE.default)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"{where}huber_scale={scale!r} is not a positive number. It is the threshold over the mean of |w|."
        )
    if group["differentiable"]:
        raise ValueError(
            f"{where}differentiable=True asks for torch's implementation, which knows no decay='huber'. Drop one of them."
        )
    if any(p.is_complex() for p in group["params"]):
        raise ValueError(
            f"{where}decay='huber' compares weights with a threshold, which complex parameters cannot be. Give them a group "
            "with another decay."
        )


@torch.no_grad()
def threshold_of(weight: Tensor, scale: float) -> Tensor:
    """The threshold for a weight that stays as it is, float32[]; 0 for one without elements."""
    total: Tensor = torch.linalg.vector_norm(weight, 1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return (total * (scale / max(weight.numel(), 1))).float()


@torch.no_grad()
def shrink(weight: Tensor, threshold: Tensor, decay_per_step: float | Tensor) -> None:
    """Take the proximal step in place."""
    limit = (1 + decay_per_step) * threshold
    weight.sub_(weight.clamp(-limit, limit) * (decay_per_step / (1 + decay_per_step)))


def unshrink(weight: Tensor, threshold: Tensor, decay_per_step: float | Tensor) -> Tensor:
    """What `shrink` was given, from what it left."""
    return weight + decay_per_step * weight.clamp(-threshold, threshold)


@torch.no_grad()
def follow(threshold: Tensor, weight: Tensor, scale: float, skipped: Tensor | None = None) -> None:
    """Move a threshold in place after a step; skipped: nonzero if that did not happen."""
    change = RATE * (threshold_of(weight, scale) - threshold)
    threshold.add_(change if skipped is None else torch.where(skipped == 0, change, 0.0))
