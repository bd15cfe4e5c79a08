"""Patterns on parameter names: what they match, and the pattern that an error suggests."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

from ..state.names import layer_type


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a parameter name.

    Args:
        pattern: an fnmatch glob for the whole name, where `*` matches dots too; or `re:` and a regular expression that is
            searched for in the name.
        name: the full name of a parameter.

    Example:
        >>> matches("*.wq.weight", "layers.0.wq.weight"), matches("re:w[qk]", "layers.0.wk.weight")
        (True, True)
    """
    return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)


def matches_any(pattern: str, names: Sequence[str]) -> bool:
    """Return whether a pattern matches at least one of the names of a parameter."""
    return any(matches(pattern, name) for name in names)


def first_match(patterns: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any] | None:
    """Return the first pattern that matches one of the names of a parameter, and its value; None where no pattern matches."""
    return next((item for item in patterns.items() if matches_any(item[0], names)), None)


def separating(labels: Mapping[tuple[str, ...], Hashable], unlisted: Collection[Hashable] = ()) -> dict[str, Any]:
    """Return patterns that give every parameter its label, in any order of the patterns.

    A pattern matches no parameter of another label, so no pattern can shadow another one. Each layer type gets the simplest
    pattern that does this: the layer type as a glob, else a regular expression for the layer type. If parameters of one layer
    type have different labels, every parameter of this type gets a pattern of its own.

    Args:
        labels: for every parameter, its names (the first name and its aliases) and its label.
        unlisted: labels that need no pattern. The patterns do not match parameters that have such a label.

    Returns:
        Patterns and the label of the parameters that each of them matches.

    Example:
        >>> separating({("0.fc.weight",): 4, ("1.fc.weight",): 4, ("0.fc1.weight",): 1}, unlisted=[1])
        {'*.fc.weight': 4}
    """
    types: dict[str, list[tuple[str, ...]]] = {}
    for names in labels:
        types.setdefault(layer_type(names[0]), []).append(names)

    def separates(pattern: str, members: Sequence[tuple[str, ...]]) -> bool:
        label = labels[members[0]]
        return all(matches(pattern, names[0]) for names in members) and all(
            other == label or not matches_any(pattern, names) for names, other in labels.items()
        )

    found: dict[str, Any] = {}
    for kind, members in types.items():
        if all(labels[names] in unlisted for names in members):
            continue
        numbers = re.escape(kind).replace(r"\*", r"\d+")
        pattern = next((p for p in (kind, f"re:^{numbers}$") if separates(p, members)), None)
        if pattern is not None:
            found[pattern] = labels[members[0]]
            continue
        for names in members:
            if labels[names] not in unlisted:
                name = names[0]
                found[name if separates(name, [names]) else f"re:^{re.escape(name)}$"] = labels[names]
    return found


def as_mapping(patterns: Mapping[str, Any], show: Callable[[Any], str] = str) -> str:
    """Return the source text of a Python dict: a pattern in double quotes, a colon, and the value as `show` writes it."""
    return "{" + ", ".join(f"{json.dumps(pattern)}: {show(value)}" for pattern, value in patterns.items()) + "}"
