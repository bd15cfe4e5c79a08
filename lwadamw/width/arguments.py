"""Arguments of `param_groups` that no step would read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Final

from ..state import keys

_OPTIONS: Final = sorted({*keys.OF_TORCH, *keys.named(keys.ALL)})


def check_values(lr: float | None, weight_decay: float | None, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse values that no step of `AdamW` would read. For groups of another optimizer nobody knows the options.

    Args:
        lr: the argument of `param_groups`.
        weight_decay: the argument of `param_groups`.
        overrides: the argument of `param_groups`.

    Raises:
        ValueError: a base value, or a key of an override that is no option.
    """
    given = {"lr": lr, "weight_decay": weight_decay}
    written = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    if written:
        raise ValueError(
            f"param_groups: {written} would be ignored, because these groups hold no base values. Give them to the optimizer: "
            f"AdamW(groups, {written}). Groups for another optimizer do hold them: fold=True, lr=..., weight_decay=...."
        )
    for pattern, own in overrides.items():
        for key in own:
            if key not in _OPTIONS:
                close = difflib.get_close_matches(key, _OPTIONS, n=1, cutoff=0.6)
                options = f"Closest: {close[0]!r}." if close else f"Options are {', '.join(_OPTIONS)}."
                raise ValueError(
                    f"param_groups: overrides[{pattern!r}] has {key!r}, which is no option of AdamW. {options} If other code "
                    "reads this key, set it in the groups that param_groups returns."
                )
