"""Decay laws: what weight decay takes from a weight in one step, and the arithmetic of it on the host.

Below, lr is the group's own value, eta = lr * width multiplier, lambda = weight_decay * width multiplier:

    coupled       w <- (1 - eta lambda) w                   torch.optim.AdamW
    independent   w <- (1 - eta lambda / peak_lr) w         Wortsman et al. 2309.14322
    corrected     w <- (1 - eta lambda lr / peak_lr) w      AdamC, Defazio 2506.02285
    huber         w <- prox of eta lambda R_delta at w      AdamHuberDecay, Guo & Fan 2511.14721

The first three take a share of the weight. Each of them is the coupled law with another weight_decay, see `per_lr`. The
share is called decay_per_step: effective lr * effective weight_decay, so 1/tau.

Huber decay is not a multiple of w, see `shrink`. Each parameter has one threshold delta, which follows the mean of |w|:

    delta <- delta + RATE (huber_scale mean |w| - delta)    after every step

Before the first step, delta is huber_scale mean |w|. docs/decay.md explains when to use which law, and which constants of
the huber law are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from . import keys

LAWS: Final = keys.DECAY.values
PEAKED: Final = ("independent", "corrected")  # the laws that divide by peak_lr, the highest learning rate
THRESHOLD: Final = "huber_threshold"  # key of delta in a parameter's state, float32[]
RATE: Final = 0.01  # the share of its distance from huber_scale mean |w| that delta moves in one step


def law_of(group: Mapping[str, Any], where: str = "") -> str:
    """Return the decay law of a group, "coupled" if the group does not name one.

    Args:
        group: a parameter group.
        where: the start of an error message, for instance "group 0: ".

    Raises:
        ValueError: there is no such law.
    """
    law = keys.DECAY.of(group)
    if law not in LAWS:
        raise ValueError(f"{where}decay={law!r} is not one of {', '.join(map(repr, LAWS))}.")
    return law


def is_huber(group: Mapping[str, Any]) -> bool:
    """Return whether a group decays by the huber law."""
    return keys.DECAY.of(group) == "huber"


def per_lr(group: Mapping[str, Any], where: str = "") -> float | Tensor:
    """Return the factor on weight_decay with which the coupled law decays exactly as the group's own law does.

    Args:
        group: a parameter group; its own `lr` is read, without width multipliers.
        where: the start of an error message, for instance "group 0: ".

    Returns:
        1 for "coupled" and "huber", 1 / peak_lr for "independent", lr / peak_lr for "corrected". A tensor if `lr` is one.

    Raises:
        ValueError: there is no such law, or the law needs a peak_lr that is not a positive number.
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
    """Check the decay law of a new group, and add the keys that the law needs.

    A law that divides by peak_lr takes the group's present lr as its peak_lr if the group has none.

    Args:
        group: the new group, changed in place.
        where: the start of an error message, for instance "group 0: ".

    Raises:
        ValueError: the law is unknown, one of its values is not valid, or it does not work with a parameter or a flag of the
            group.
    """
    law = law_of(group, where)
    if law == "coupled":
        group.pop(keys.DECAY.name, None)  # without this key, the checkpoint is one of torch.optim.AdamW
    if law in PEAKED and keys.PEAK_LR.of(group) is None:
        # A scheduler that was built before has changed lr, and stored the value from before in initial_lr.
        group[keys.PEAK_LR.name] = float(group.get("initial_lr", group["lr"]))
    per_lr(group, where)
    if law != "huber":
        return
    scale = group.setdefault(keys.HUBER_SCALE.name, keys.HUBER_SCALE.default)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"{where}huber_scale={scale!r} is not a positive number. The threshold of a parameter is huber_scale times the "
            "mean of |w|. Leave huber_scale out for 1.0."
        )
    if group["differentiable"]:
        raise ValueError(
            f"{where}differentiable=True asks for torch's implementation, which has no decay='huber'. Leave out one of the "
            "two."
        )
    if any(p.is_complex() for p in group["params"]):
        raise ValueError(
            f"{where}decay='huber' compares weights with a threshold, and complex numbers have no order. Put the complex "
            "parameters into a group with decay='coupled'."
        )


@torch.no_grad()
def absolute_sum(weight: Tensor) -> Tensor:
    """Return the sum of |w|, float64[].

    Args:
        weight: a weight or a part of it, of any shape and any real dtype.
    """
    total: Tensor = torch.linalg.vector_norm(weight, 1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return total.double()


def threshold_of(weight: Tensor, scale: float) -> Tensor:
    """Return the threshold that a weight would have in the long run if it did not change.

    Args:
        weight: the whole weight, of any shape and any real dtype.
        scale: `huber_scale` of the group.

    Returns:
        scale * mean |w|, float32[]. For a weight without elements it is 0.
    """
    return (absolute_sum(weight) * (scale / max(weight.numel(), 1))).float()


@torch.no_grad()
def shrink(weight: Tensor, threshold: Tensor, decay_per_step: float | Tensor) -> None:
    """Apply huber decay to a weight in place: the proximal step of decay_per_step * R_delta.

    With d = decay_per_step, delta = threshold and limit = (1 + d) delta:

        w <- w / (1 + d)             where |w| <= limit
             w - d delta sign(w)     elsewhere

    Both cases together are w - d/(1 + d) clip(w, -limit, limit), which is what this function computes.

    Args:
        weight: the weight, of any shape.
        threshold: delta, float32[].
        decay_per_step: effective lr * effective weight_decay.

    Source: Guo & Fan 2511.14721.
    """
    limit = (1 + decay_per_step) * threshold
    weight.sub_(weight.clamp(-limit, limit) * (decay_per_step / (1 + decay_per_step)))


def unshrink(weight: Tensor, threshold: Tensor, decay_per_step: float | Tensor) -> Tensor:
    """Return the weight before `shrink`, computed from the weight after it.

    Args:
        weight: the weight that `shrink` left, of any shape.
        threshold: the threshold that `shrink` was given, float32[].
        decay_per_step: the value that `shrink` was given.
    """
    return weight + decay_per_step * weight.clamp(-threshold, threshold)


@torch.no_grad()
def follow(threshold: Tensor, target: Tensor, skipped: Tensor | None = None) -> None:
    """Move a threshold in place after a step: by RATE of its distance from huber_scale mean |w|.

    Args:
        threshold: delta, float32[], changed in place.
        target: huber_scale mean |w| of the whole weight after the step, float32[].
        skipped: nonzero on the device if the step was skipped; then the threshold stays. None: the step was taken.
    """
    change = RATE * (target - threshold)
    threshold.add_(change if skipped is None else torch.where(skipped == 0, change, 0.0))
