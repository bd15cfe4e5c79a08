"""Groups: the values of a parameter group that the step uses, and the checks on a new group."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from . import decay, keys
from .callers import caller_level
from .names import names_of
from .storage import check_options, check_parameter

_PLAIN_NUMBERS = keys.named((*keys.WIDTH, keys.WIDTH_WARMUP, keys.PEAK_LR, keys.HUBER_SCALE))
_READ = (*keys.OF_TORCH, "params", "param_names", "initial_lr", *keys.named(keys.ALL))


class Effective(NamedTuple):
    """Hyperparameters of a group after its width multipliers and its decay law have been applied.

    Attributes:
        lr: the learning rate that the step multiplies the update with.
        weight_decay: the value with which the coupled law decays as the group's own law does.
        eps: the value that the step adds to the denominator.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    eps: float | Tensor


def effective(group: Mapping[str, Any]) -> Effective:
    """Return the values of a group that the step uses: base values times width multipliers.

    A group without width multipliers is treated as if they were 1. `lr` is also multiplied with `width_warmup`.

    `weight_decay` is the value that torch's law, w <- (1 - lr weight_decay) w, needs at the present lr in order to decay as
    the group's own law does. So 1/(lr weight_decay) is tau under every law. With decay="huber" this holds for weights below
    the threshold.

    Args:
        group: one of an optimizer's `param_groups`.

    Returns:
        lr, weight_decay and eps. Each is a float, or a tensor if the group's lr or base value is a tensor.

    Raises:
        ValueError: the group's decay law is unknown, or needs a peak_lr that is not a positive number.

    Examples:
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


def check_numbers(group: Mapping[str, Any], where: str) -> None:
    """Check that every hyperparameter of a group is an object whose changes the step can see, and that none asks for Adam.

    Args:
        group: one of an optimizer's `param_groups`.
        where: the start of an error message, for instance "group 0: ".

    Raises:
        TypeError: `lr`, `eps`, `weight_decay` or one of `betas` is neither a number nor a tensor of one element, or a width
            multiplier, `width_warmup`, `peak_lr` or `huber_scale` is not a number.
        ValueError: the group is one of torch.optim.Adam, whose weight decay is a part of the gradient.
    """
    # From torch 2.7 on, torch.optim.AdamW would take the step of Adam for such a group.
    if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
        raise ValueError(
            f"{where}decoupled_weight_decay=False with weight_decay={group['weight_decay']} asks for Adam, which adds the "
            "decay to the gradient. lwadamw.AdamW does not. Set the key to True and tune weight_decay anew, or set "
            "weight_decay to 0, or use torch.optim.Adam."
        )
    betas = group["betas"]
    if len(betas) != 2:
        raise TypeError(f"{where}betas={betas!r} are not two numbers. Give a pair such as (0.9, 0.999).")
    values = {key: group[key] for key in ("lr", "eps", "weight_decay")} | {f"betas[{i}]": betas[i] for i in (0, 1)}
    for key, value in values.items():
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise TypeError(
                f"{where}{key}={value!r} is a {type(value).__name__}. Give a float, or a torch.Tensor of one element to change "
                "it in place."
            )
    for name in _PLAIN_NUMBERS:
        value = group.get(name)
        if value is not None and not isinstance(value, Real):
            raise TypeError(
                f"{where}{name}={value!r} is a {type(value).__name__}. Give a float, and assign a new one to change it."
            )


def _warn_of_misspelt_keys(group: Mapping[str, Any], where: str) -> None:
    """Warn of keys that nobody reads and that are nearly the names of keys that the step reads."""
    for key in group:
        close = [] if key in _READ else difflib.get_close_matches(key, _READ, n=1, cutoff=0.88)
        if close:
            warnings.warn(
                f"lwadamw.AdamW: {where}nobody reads the key {key!r}. Closest: {close[0]!r}.", stacklevel=caller_level()
            )


def complete_group(group: dict[str, Any], index: int) -> None:
    """Check a new group, and add the keys that it needs.

    If a group has one width multiplier, the missing ones become 1. If its law needs a peak_lr and it has none, peak_lr
    becomes its lr.

    Args:
        group: the new group, changed in place.
        index: its position in `param_groups`, for error messages.

    Warns:
        UserWarning: a key is nearly the name of another one, such as `weight_deacy`.

    Raises:
        ValueError: a storage option, the decay law, a width multiplier or a segment is not valid, a parameter does not fit the
            storage options, or the group is one of torch.optim.Adam with weight decay.
        TypeError: a hyperparameter is neither a number nor a tensor of one element.
    """
    where = f"group {index}: "
    _warn_of_misspelt_keys(group, where)
    check_options(group, where)
    decay.complete_law(group, where)
    named = list(zip(names_of(group, index), group["params"], strict=True))
    for name, p in named:
        check_parameter(p, name, group)
    if any(key.name in group for key in keys.WIDTH):
        for key in keys.WIDTH:
            value = group.setdefault(key.name, key.default)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{where}{key.name}={value!r} is not a finite number >= 0. Leave {key.name} out for 1.0."
                )
    check_numbers(group, where)
    params = dict(named)
    for name, rows in (keys.SEGMENTS.of(group) or {}).items():
        if name not in params:
            raise ValueError(
                f"{where}segments for {name!r}, which is not a parameter of this group. Its parameters are called "
                f"{', '.join(map(repr, [*params][:3]))}{', ...' if len(params) > 3 else ''}."
            )
        shape = tuple(params[name].shape)
        if not shape or sum(rows) != shape[0] or min(rows) < 1:
            raise ValueError(
                f"{where}segments {tuple(rows)} of {name!r} {shape} are not positive row counts that add up to its first "
                "dimension. Give one row count per segment."
            )
