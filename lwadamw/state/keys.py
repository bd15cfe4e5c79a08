"""The keys that this package adds to a parameter group: the default of each, its values, its writer and its reader.

No other module contains the name or the default of one of these keys. A group without a key is treated as a group in which
the key has its default. The groups of a plain `AdamW` have none of these keys, so its checkpoints are exactly those of
torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import torch

T = TypeVar("T")

_DTYPES: Final = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8)}


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """One key of a parameter group.

    Attributes:
        name: the key itself, as it stands in the group.
        default: the value that a group without the key is treated as having.
        written_by: who puts the key into a group.
        read_by: who reads the key, and what for.
        values: all valid values, the default first. An empty tuple: the values are not a short list, and the module that
            reads the key checks them.
    """

    name: str
    default: T
    written_by: str
    read_by: str
    values: tuple[T, ...] = ()

    def of(self, group: Mapping[str, Any]) -> T:
        """Return the value of this key in a group, or the default if the group does not have the key.

        The name of a dtype is read as the dtype: checkpoints have names, and some loaders put them into groups as they are.

        Args:
            group: one of an optimizer's `param_groups`, or any mapping with such keys.

        Examples:
            >>> ROUNDING.of({"rounding": "kahan"}), ROUNDING.of({})
            ('kahan', 'nearest')
        """
        value: T = group.get(self.name, self.default)
        return _DTYPES.get(value, value) if value.__class__ is str else value  # type: ignore[call-overload]


_RULES = "param_groups"
_USER = "the arguments of AdamW, or the user in the group"

WIDTH_LR_MULT: Final = Key("width_lr_mult", 1.0, _RULES, "the step: multiplies lr")
WIDTH_WD_MULT: Final = Key("width_wd_mult", 1.0, _RULES, "the step: multiplies weight_decay")
WIDTH_EPS_MULT: Final = Key("width_eps_mult", 1.0, _RULES, "the step: multiplies eps")
WIDTH_WARMUP: Final = Key("width_warmup", 1.0, "schedulers of lwadamw.schedules", "the step: multiplies lr")
ROLE: Final = Key("role", "-", _RULES, "summary, monitor, schedules")
RULE: Final = Key("rule", "none", _RULES, "summary, profiles")
SEGMENTS: Final[Key[Mapping[str, tuple[int, ...]]]] = Key(
    "segments", {}, _RULES, "norms: row counts of the segments, by parameter name"
)

DECAY: Final = Key("decay", "coupled", _USER, "the step", ("coupled", "independent", "corrected", "huber"))
PEAK_LR: Final[Key[float | None]] = Key("peak_lr", None, _USER, "the step: 'independent' and 'corrected' divide by it")
HUBER_SCALE: Final = Key("huber_scale", 1.0, _USER, "the step: threshold = huber_scale * mean of |w|")

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
ROUNDING_SEED: Final = Key("rounding_seed", 0, _USER, "the step: the seed of the random bits")
GRAD_ATTRIBUTE: Final = Key(
    "grad_attribute",
    "grad",
    _USER,
    "the step: the attribute of a parameter that holds its gradient",
    ("grad", "main_grad", "decoupled_grad"),
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

# The keys of torch's AdamW that are options.
OF_TORCH: Final = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
)  # fmt: skip


def named(keys: tuple[Key[Any], ...]) -> tuple[str, ...]:
    """Return the names of the given keys, in the same order.

    Examples:
        >>> named(WIDTH)
        ('width_lr_mult', 'width_wd_mult', 'width_eps_mult')
    """
    return tuple(key.name for key in keys)


def given(keys: tuple[Key[Any], ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the default of their key, by key name.

    A constructor uses it to write only the options that the user has set, so that a plain group gets no new keys.

    Args:
        keys: the keys to look for.
        values: values by key name. Keys that are missing here, and entries that are not among `keys`, are left out.

    Examples:
        >>> given(STORAGE, {"rounding": "kahan", "rounding_seed": 0, "lr": 0.1})
        {'rounding': 'kahan'}
    """
    return {key.name: values[key.name] for key in keys if key.name in values and values[key.name] != key.default}
