"""Telling: processes tell each other what they know of the parts of parameters that they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .collectives import Call, gathered
from .shards import Split, check_named

T = TypeVar("T")


def tell(
    split: Split, known: Mapping[str, T], join: Callable[[Sequence[T]], T], call: Call, nameless: bool = False
) -> dict[str, T]:
    """Return what all processes of a split know. This is collective: one call for each process group.

    Args:
        split: how the parameters are split.
        known: what this process knows, by the name of the parameter. It can be pickled.
        join: makes one value of what several processes know of the same parameter.
        call: what the user has called.
        nameless: whether a name of `known` is one by which no other process can recognise the parameter.

    Returns:
        The joined values by name, in the same order on every process.

    Raises:
        RuntimeError: another process did not make the call, or a process has nameless parameters.
    """
    found = dict(known)
    for group in split.groups:
        told = gathered((found, nameless), group, call)
        nameless = any(some for _, some in told)
        check_named(nameless, call)
        everybody = [known_there for known_there, _ in told]
        names = sorted({name for some in everybody for name in some})
        found = {name: join([some[name] for some in everybody if name in some]) for name in names}
    return found
