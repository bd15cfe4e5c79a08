"""What the step uses of a parameter group, and what a new group has to fulfil."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import decay, keys
from .names import names_of
from .storage import check_options, check_parameter


class Effective(NamedTuple):
    """Hyperparameters of a group with its width multipliers and decay law applied."""

    lr: float | Tensor
    weight_decay: float | Tensor
    eps: float | Tensor


def effective(group: Mapping[str, Any]) -> Effective:
    """What the step uses of a group: base values times width multipliers (1 where a group has none).

    weight_decay is the one that torch's law, eta lambda, would need at this lr to decay as the group's own does, so that
    1/(lr weight_decay) is tau under every law. With decay="huber" it acts so on weights below the threshold.

    >>> effective({"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8, "width_lr_mult": 0.25, "width_wd_mult": 2.0})
    Effective(lr=0.00025, weight_decay=0.2, eps=1e-08)
    """

    def scaled(key: str, multiplier: float) -> float | Tensor:
        value: float | Tensor = group[key]
        return value if multiplier == 1 else value * multiplier

    lr_mult, wd_mult, eps_mult = (key.of(group) for key in keys.WIDTH)
    lr_mult *= keys.WIDTH_WARMUP.of(group)
    weight_decay = scaled("weight_decay", wd_mult)
    if keys.DECAY.name in group:
        weight_decay = weight_decay * decay.per_lr(group)
    return Effective(scaled("lr", lr_mult), weight_decay, scaled("eps", eps_mult))


def complete_group(group: dict[str, Any], index: int) -> None:
    """Raise a ValueError if a group's storage options, decay law, width multipliers or segments are not valid.

    Width multipliers that are left out of a group that has one of them become 1, a peak_lr that a law needs its lr.
    """
    check_options(group, f"group {index}: ")
    decay.complete_law(group, f"group {index}: ")
    for name, p in zip(names_of(group, index), group["params"], strict=True):
        check_parameter(p, name, group)
    if any(key.name in group for key in keys.WIDTH):
        for key in keys.WIDTH:
            value = group.setdefault(key.name, key.default)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"group {index}: {key.name}={value!r} is not a finite number >= 0. Leave it out for 1."
                )
    for name, rows in (keys.SEGMENTS.of(group) or {}).items():
        params = dict(zip(group.get("param_names", ()), group["params"], strict=True))
        if name not in params:
            raise ValueError(f"group {index}: segments for {name!r}, which is not a named parameter of this group.")
        shape = tuple(params[name].shape)
        if not shape or sum(rows) != shape[0] or min(rows) < 1:
            raise ValueError(
                f"group {index}: segments {tuple(rows)} of {name!r} {shape} are not positive row counts that add up to "
                f"its first dimension."
            )
