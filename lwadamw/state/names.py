"""Names of parameters: the name of a parameter that was given none, and the name that equal layers share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

# An attribute of a tensor, because engines replace groups, and save whatever they find in a group.
_ATTRIBUTE: Final = "_lwadamw_name"


def give_name(p: Any, name: str) -> None:
    """Give a tensor a name, which counts in groups that have no names.

    Args:
        p: the tensor.
        name: its name.
    """
    setattr(p, _ATTRIBUTE, name)


def is_named(p: Any, group: Mapping[str, Any]) -> bool:
    """Return whether a parameter has a name, from its group or from `give_name`.

    Args:
        p: the parameter.
        group: its group, one of an optimizer's `param_groups`.
    """
    return has_names(group) or hasattr(p, _ATTRIBUTE)


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

    If `has_names` is False, the name of a parameter is the one that `give_name` gave it, or else the index of the group, a
    dot, and the position of the parameter in the group.

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
        else [getattr(p, _ATTRIBUTE, f"{index}.{i}") for i, p in enumerate(group["params"])]
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
