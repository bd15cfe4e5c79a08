"""Names of parameters: what a parameter without a name is called, and names without their layer numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def names_of(group: Mapping[str, Any], index: int) -> list[str]:
    """Return the names of a group's parameters, in the order of its `params`.

    A parameter of a group without names is called by its place: group, dot, position in the group.

    Args:
        group: one of an optimizer's `param_groups`.
        index: the position of the group in `param_groups`.

    Example:
        >>> names_of({"params": ["p", "q"]}, 2)
        ['2.0', '2.1']
        >>> names_of({"params": ["p"], "param_names": ["w"]}, 2)
        ['w']
    """
    return list(group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))])


def layer_type(name: str) -> str:
    """Return the name with `*` for every path component that is a number, so that equal layers share it.

    Digits inside a component stay: `w1` and `w2` are two matrices. So does the index of a segment, in brackets.

    Example:
        >>> layer_type("layers.11.w1.weight"), layer_type("layers.11.qkv.weight[0]")
        ('layers.*.w1.weight', 'layers.*.qkv.weight[0]')
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
