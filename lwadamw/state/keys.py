"""The keys that this package adds to a parameter group: default, values, who writes each and who reads it.

This is the only place that knows the name and the default of a key. A group that lacks a key counts as having its default.
Groups of a plain AdamW have none of these keys, so that its checkpoints are those of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """One key of a parameter group."""

    name: str
    default: T
    written_by: str
    read_by: str
    values: tuple[T, ...] = ()  # all valid values, the default first; (): values are checked elsewhere

    def of(self, group: Mapping[str, Any]) -> T:
        """Return the group's value, or the default where the group has none."""
        value: T = group.get(self.name, self.default)
        return value


_RULES = "param_groups"
_USER = "AdamW's arguments, or the user in the group"

WIDTH_LR_MULT: Final = Key("width_lr_mult", 1.0, _RULES, "the step: multiplies lr")
WIDTH_WD_MULT: Final = Key("width_wd_mult", 1.0, _RULES, "the step: multiplies weight_decay")
WIDTH_EPS_MULT: Final = Key("width_eps_mult", 1.0, _RULES, "the step: multiplies eps")
WIDTH_WARMUP: Final = Key("width_warmup", 1.0, "schedulers of lwadamw.schedules", "the step: multiplies lr")
ROLE: Final = Key("role", "-", _RULES, "summary, monitor, schedules")
RULE: Final = Key("rule", "none", _RULES, "summary, profiles")
SEGMENTS: Final[Key[Mapping[str, tuple[int, ...]]]] = Key(
    "segments", {}, _RULES, "norms: rows of each segment, by name"
)

DECAY: Final = Key("decay", "coupled", _USER, "the step", ("coupled", "independent", "corrected", "huber"))
PEAK_LR: Final[Key[float | None]] = Key("peak_lr", None, _USER, "the step: 'independent' and 'corrected' divide by it")
HUBER_SCALE: Final = Key("huber_scale", 1.0, _USER, "the step: the huber threshold over the mean of |w|")

EXP_AVG_DTYPE: Final[Key[torch.dtype | None]] = Key(
    "exp_avg_dtype", None, _USER, "state creation", (None, torch.float32, torch.bfloat16, torch.int8)
)
EXP_AVG_SQ_DTYPE: Final[Key[torch.dtype | None]] = Key(
    "exp_avg_sq_dtype", None, _USER, "state creation", (None, torch.float32, torch.bfloat16, torch.uint8)
)
MASTER_WEIGHTS: Final[Key[torch.dtype | str | None]] = Key(
    "master_weights", None, _USER, "state creation", (None, torch.float32, "remainder")
)
ROUNDING: Final = Key("rounding", "nearest", _USER, "the step, state creation", ("nearest", "stochastic", "kahan"))
ROUNDING_SEED: Final = Key("rounding_seed", 0, _USER, "the step: seed of random rounding")
GRAD_ATTRIBUTE: Final = Key(
    "grad_attribute", "grad", _USER, "the step: where gradients are", ("grad", "main_grad", "decoupled_grad")
)

WIDTH: Final = (WIDTH_LR_MULT, WIDTH_WD_MULT, WIDTH_EPS_MULT)
LAW: Final[tuple[Key[Any], ...]] = (DECAY, PEAK_LR, HUBER_SCALE)
STORAGE: Final[tuple[Key[Any], ...]] = (
    EXP_AVG_DTYPE,
    EXP_AVG_SQ_DTYPE,
    MASTER_WEIGHTS,
    ROUNDING,
    ROUNDING_SEED,
    GRAD_ATTRIBUTE,
)
ALL: Final[tuple[Key[Any], ...]] = (*WIDTH, WIDTH_WARMUP, ROLE, RULE, SEGMENTS, *LAW, *STORAGE)


def named(keys: tuple[Key[Any], ...]) -> tuple[str, ...]:
    """Return the names of some keys."""
    return tuple(key.name for key in keys)


def given(keys: tuple[Key[Any], ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those values, by key name, that differ from the default of their key."""
    return {key.name: values[key.name] for key in keys if key.name in values and values[key.name] != key.default}
