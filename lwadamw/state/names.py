"""Names of parameters: the name of a parameter that was given none, and the name that equal layers share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def has_names(group: Mapping[str, Any]) -> bool:
    """Return whether a group has exactly one name for each of its parameters.

    A group that was built without names has no `param_names`. The numbers of names and parameters differ if somebody has
    replaced `group["params"]`: nobody can tell then which name belongs to which parameter.

    Args:
        group: one of an optimizer's `param_groups`.
    """
    return len(group.get("param_names") or ()) == len(group["params"])


def names_of(group: Mapping[str, Any], index: int) -> list[str]:
    """Return the names of a group's parameters, in the order of `group["params"]`.

    If `has_names` is False, the name of each parameter is the index of the group, a dot, and the position of the parameter
    in the group.

    Args:
        group: one of an optimizer's `param_groups`.
        index: the position of the group in `param_groups`.

    Examples:
        >>> names_of({"params": ["p", "q"]}, 2)
        ['2.0', '2.1']
        >>> names_of({"params": ["p"], "param_names": ["w"]}, 2)
        ['w']
    """
    return (
        list(group.get("param_names") or ())
        if has_names(group)
        else [f"{index}.{i}" for i in range(len(group["params"]))]
    )


def layer_type(name: str) -> str:
    """Return a name with `*` in place of every layer number, so that equal layers get the same name.

    A layer number is a path component that consists of digits only. Digits inside a component stay, because `w1` and `w2`
    are two different matrices. The index of a segment, in brackets, stays too.

    Args:
        name: the name of a parameter, or of a segment of it.

    Examples:
        >>> layer_type("layers.11.w1.weight"), layer_type("layers.11.qkv.weight[0]")
        ('layers.*.w1.weight', 'layers.*.qkv.weight[0]')
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
