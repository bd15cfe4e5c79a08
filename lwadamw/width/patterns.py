"""Patterns on parameter names: what they match, and the pattern that an error suggests."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Final

from ..state.names import layer_type

# Before a pattern: the user means every parameter that it matches, however unlike they are.
ALL: Final = "all:"


@functools.lru_cache(maxsize=4096)
def matcher(pattern: str) -> Callable[[str], object]:
    """Return the function that says whether a name matches a pattern.

    Args:
        pattern: an fnmatch glob for the whole name, where `*` matches dots too; or `re:` and a regular expression that is
            searched for in the name. `all:` may stand before both.

    Raises:
        ValueError: the regular expression is none.
    """
    body = pattern.removeprefix(ALL)
    try:
        return re.compile(body[3:]).search if body.startswith("re:") else re.compile(fnmatch.translate(body)).match
    except re.error as error:
        raise ValueError(
            f"pattern {pattern!r} is not a regular expression: {error}. Correct it, or leave out 're:' to write a glob."
        ) from None


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a parameter name.

    Args:
        pattern: as for `matcher`.
        name: the full name of a parameter.

    Examples:
        >>> matches("*.wq.weight", "layers.0.wq.weight"), matches("re:w[qk]", "layers.0.wk.weight")
        (True, True)
    """
    return bool(matcher(pattern)(name))


def matches_any(pattern: str, names: Sequence[str]) -> bool:
    """Return whether a pattern matches at least one of the names of a parameter."""
    return any(map(matcher(pattern), names))


def first_match(patterns: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any] | None:
    """Return the first pattern that matches one of the names of a parameter, and its value; None where no pattern matches."""
    return next((item for item in patterns.items() if any(map(matcher(item[0]), names))), None)


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

    Examples:
        >>> separating({("0.fc.weight",): 4, ("1.fc.weight",): 4, ("0.fc1.weight",): 1}, unlisted=[1])
        {'*.fc.weight': 4}
    """
    types: dict[str, list[tuple[str, ...]]] = {}
    # A pattern for a layer type matches all or none of the parameters whose names have the same layer types.
    alike: dict[tuple[Hashable, ...], tuple[str, ...]] = {}
    for names, label in labels.items():
        types.setdefault(layer_type(names[0]), []).append(names)
        alike.setdefault((label, *map(layer_type, names)), names)

    def separates(pattern: str, members: Sequence[tuple[str, ...]], others: Collection[tuple[str, ...]]) -> bool:
        match, label = matcher(pattern), labels[members[0]]
        return all(match(names[0]) for names in members) and not any(
            labels[names] != label and any(map(match, names)) for names in others
        )

    found: dict[str, Any] = {}
    for kind, members in types.items():
        if all(labels[names] in unlisted for names in members):
            continue
        numbers = re.escape(kind).replace(r"\*", r"\d+")
        one_label = len({labels[names] for names in members}) == 1
        pattern = next(
            (p for p in (kind, f"re:^{numbers}$") if one_label and separates(p, members, alike.values())), None
        )
        if pattern is not None:
            found[pattern] = labels[members[0]]
            continue
        for names in members:
            if labels[names] not in unlisted:
                name = names[0]
                found[name if separates(name, [names], labels) else f"re:^{re.escape(name)}$"] = labels[names]
    return found


def as_mapping(patterns: Mapping[str, Any], show: Callable[[Any], str] = str) -> str:
    """Return the source text of a Python dict: a pattern in double quotes, a colon, and the value as `show` writes it."""
    return "{" + ", ".join(f"{json.dumps(pattern)}: {show(value)}" for pattern, value in patterns.items()) + "}"


def as_lines(patterns: Mapping[str, Any], show: Callable[[Any], tuple[str, str]]) -> str:
    """Return the source text of a Python dict with one line for each pattern.

    Args:
        patterns: patterns and their values.
        show: gives the source text of a value and the comment that follows it; "" for no comment.
    """
    lines = ["{"]
    for pattern, value in patterns.items():
        text, comment = show(value)
        lines.append(f"    {json.dumps(pattern)}: {text}," + (f"  # {comment}" if comment else ""))
    return "\n".join([*lines, "}"])
