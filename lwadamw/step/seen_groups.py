"""Seen groups: what the groups held at the last step of the torch backend, and which of their values have moved since."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from operator import is_
from typing import Any, Final, Literal

from ..state import keys
from ..state.identity import same, snapshot

# What schedulers assign at every step.
_MOVING: Final = ("lr", "weight_decay")


class SeenGroups:
    """The objects in all groups at one step. A step asks what has changed since, and needs one loop in C for the answer."""

    def __init__(self) -> None:
        # Every object in every group at the last step, with copies of lists and dicts.
        self._referents: list[Any] = []
        # Where `_MOVING` of each group are among the referents. None: not known yet.
        self._places: list[int] | None = None
        self._naming: list[Any] = []  # names and segments of every group at the last step
        self._current: list[Any] | None = None  # every object in every group now, if `names_hold` has collected them
        self._moved: list[Any] = []  # what `accept` takes as the objects of the last step

    def names_hold(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether the groups give their parameters the same names and segments as at the last step.

        Args:
            groups: the optimizer's parameter groups.
        """
        self._current = gc.get_referents(*groups)
        return same(self._current, self._referents) or same(_naming_of(groups), self._naming)

    def change(self, groups: Sequence[dict[str, Any]]) -> Literal["none", "values", "other"]:
        """Return what has changed since the last step.

        Args:
            groups: the optimizer's parameter groups.

        Returns:
            "values": learning rates or weight decays, numbers before and now, and nothing else. "other": anything else.
        """
        current, self._current = self._current or gc.get_referents(*groups), None
        self._moved = self._referents
        if same(current, self._referents):
            return "none"
        if self._places is None:
            self._places = _places_in(groups)
        values, places = [group.get(key) for group in groups for key in _MOVING], self._places
        if len(current) != len(self._referents) or len(values) != len(places) or max(places) >= len(current):
            return "other"
        former = [self._referents[place] for place in places]
        # Where groups have other keys than before, other objects are at these places.
        here = all(map(is_, [current[place] for place in places], values))
        if not here or not {*map(type, values), *map(type, former)} <= {float, int}:
            return "other"
        seen = self._referents.copy()
        for place, value in zip(places, values, strict=True):
            seen[place] = value
        if not same(current, seen):
            return "other"
        self._moved = seen
        return "values"

    def accept(self) -> None:
        """Take the values that the last call of `change` has found as those of the last step."""
        self._referents = self._moved

    def remember(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take the groups as they are as those of the last step.

        Args:
            groups: the optimizer's parameter groups.
        """
        self._referents, self._places = snapshot(gc.get_referents(*groups)), None
        self._naming = snapshot(_naming_of(groups))


def _places_in(groups: Sequence[dict[str, Any]]) -> list[int]:
    """Return where the values of `_MOVING` are among the objects of all groups: as many as groups times keys, or none."""
    places: list[int] = []
    start = 0
    for group in groups:
        names = list(group)
        places += [start + names.index(key) for key in _MOVING if key in group]
        start += len(names)
    return places


def _naming_of(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """Return what the groups say about the names and segments of their parameters."""
    return [(group.get("param_names"), group.get(keys.SEGMENTS.name)) for group in groups]
