"""What is known about the segments of an optimizer before any step: fan_in, rule, and whether a prediction holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..state import decay
from ..state.arrays import Array
from ..state.members import members_of


def without_prediction(group: Mapping[str, Any]) -> str:
    """Return why the steady state of a group cannot be predicted. The text is empty if it can.

    With amsgrad the second moment never falls, so the size of an update is not that of Adam. Huber decay takes a constant from
    large weights instead of a share. So tau says nothing about how much is left of the initial weights.

    Args:
        group: one of an optimizer's `param_groups`.
    """
    if group.get("amsgrad"):
        return "amsgrad"
    return "decay='huber'" if decay.is_huber(group) else ""


def fan_ins(names: Sequence[str], optimizer: Any) -> Array:
    """Return the fan_in of every segment, float64[len(names)]. It is NaN where it is not known.

    Args:
        names: names of the segments.
        optimizer: the optimizer that has them.
    """
    evidence = getattr(optimizer, "evidence", {})
    known = {name: found.fan_in for name, found in evidence.items()}
    for member in members_of(optimizer.param_groups):
        known |= dict.fromkeys(member.segment_names(), known.get(member.name))
    return np.array([known.get(name) or math.nan for name in names], dtype=np.float64)


def rules_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the rule of some groups. Several names are joined with commas, and "none" stands for no rule."""
    return ", ".join(dict.fromkeys(str(group["rule"]) for group in groups if "rule" in group)) or "none"
