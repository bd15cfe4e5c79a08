"""Naming: the names of an optimizer's parameters follow the parameters when somebody edits the lists of a group.

torch keeps names in `group["param_names"]`, a list beside `group["params"]`. Code that filters, reorders or extends
`group["params"]` seldom knows of the second list. So the optimizer remembers which parameter has which name, and writes
the list of names again where it no longer fits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import keys
from .identity import same
from .members import ParamGroups


class _Seen(NamedTuple):
    """The parameters and names of one group when they last fitted together."""

    params: list[Tensor]
    shapes: list[torch.Size | None]  # None: a lazy module does not know it yet
    names: list[str]

    def has(self, params: Sequence[Tensor]) -> bool:
        """Return whether these are the parameters of this group, in the same order."""
        return same(self.params, list(params))


class Naming:
    """Which parameter of an optimizer has which name. A parameter that has left is remembered while others refer to it.

    When the groups change the next time, a parameter that nobody else refers to is forgotten.

    Args:
        evidence: what is known about each parameter, by name. If a parameter is renamed, so is its key in this dict.
    """

    def __init__(self, evidence: dict[str, Any]) -> None:
        self._evidence = evidence
        self._names: dict[int, tuple[Tensor, str]] = {}  # by id() of the parameter
        self._seen: dict[tuple[str, ...], _Seen] = {}  # by the names of the group

    def adopt(self, groups: ParamGroups) -> None:
        """Take the names of all groups for true, for instance because a checkpoint has been loaded.

        Args:
            groups: the optimizer's `param_groups`. A group without one name for each parameter is left to `follow`.
        """
        self._seen = {}
        self._forget_dead()
        for group in groups:
            self._remember(group)

    def add(self, groups: ParamGroups) -> None:
        """Remember the names of a group that has been added.

        Args:
            groups: the optimizer's `param_groups`. The last one is new.

        Raises:
            ValueError: the group has another number of names than of parameters.
        """
        group = groups[-1]
        if _names_in(group) and len(group["param_names"]) != len(group["params"]):
            raise ValueError(_mismatch(len(groups) - 1, group))
        self._remember(group)

    def _remember(self, group: dict[str, Any]) -> None:
        params, names = group["params"], _names_in(group)
        if names is None or len(names) != len(params):
            return
        self._seen[tuple(names)] = _Seen(list(params), [None if is_lazy(p) else p.shape for p in params], list(names))
        # Of a parameter that stands twice in the group, the first name counts.
        for p, name in reversed(list(zip(params, names, strict=True))):
            self._names[id(p)] = (p, name)

    def _forget_dead(self) -> None:
        """Forget the parameters that nobody else refers to any more, so that their memory is freed."""
        # Weak references would say it too, but torch.utils.swap_tensors refuses tensors that have any.
        loop_and_call = 2  # references to `p` besides the one in the dict
        alive = [(p, name) for p, name in self._names.values() if sys.getrefcount(p) > 1 + loop_and_call]
        self._names = {id(p): (p, name) for p, name in alive}

    def _name(self, p: Tensor) -> str | None:
        known, name = self._names.get(id(p), (None, None))
        return name if known is p else None

    def follow(self, groups: ParamGroups) -> None:
        """Bring `group["param_names"]` of every group in line with `group["params"]`, after somebody may have edited them.

        - Only the parameters have changed: each parameter keeps its name. A parameter that never had a name is called by
          its place, as in `names_of`. If parameters of the same shapes have been put in the places of old ones, they
          take over the names of the old ones.
        - Only the names have changed: the parameters have been renamed. Segments by the old names follow.
        - Both have changed: the names are taken as they are.

        Args:
            groups: the optimizer's `param_groups`. Names and segments are changed in place.

        Raises:
            ValueError: a group has another number of names than of parameters, and none of the above explains it. No
                group has been changed then.
        """
        changed = [(i, g) for i, g in enumerate(groups) if _names_in(g) is not None and not self._fits(g)]
        if not changed:
            return
        named = [self._names_for(i, group) for i, group in changed]
        renamed: dict[str, str] = {}
        for (i, group), names in zip(changed, named, strict=True):
            if names is None:
                renamed |= self._rename_segments(group)
            else:
                taken = {name for j, g in enumerate(groups) if j != i for name in _names_in(g) or ()}
                group["param_names"] = list(_with_places(names, i, taken))
        for old in renamed.keys() & self._evidence.keys():
            self._evidence.setdefault(renamed[old], self._evidence.pop(old))
        _move_segments(groups)
        self.adopt(groups)

    def _fits(self, group: dict[str, Any]) -> bool:
        """Return whether every parameter of a group has the name that it is remembered by."""
        seen = self._seen.get(tuple(group["param_names"]))
        return seen is not None and seen.has(group["params"])

    def _names_for(self, index: int, group: dict[str, Any]) -> list[str | None] | None:
        """Return the remembered names of a group's parameters, or None if the names in the group are right."""
        params, names = group["params"], list(group["param_names"])
        fits = len(params) == len(names)
        remembered = [self._name(p) for p in params]
        if fits and remembered == names:
            return None
        before = self._seen.get(tuple(names))
        if before is not None:
            replaced = fits and all(
                name == old or (name is None and p.shape == shape)
                for p, name, old, shape in zip(params, remembered, names, before.shapes, strict=True)
            )
            return None if replaced else remembered
        if fits:
            return None
        if not names:
            return remembered
        raise ValueError(_mismatch(index, group))

    def _rename_segments(self, group: dict[str, Any]) -> dict[str, str]:
        """Give the segments of a group the new names of its parameters. Return the new names by the old ones."""
        pairs = zip(map(self._name, group["params"]), group["param_names"], strict=True)
        renamed = {old: new for old, new in pairs if old is not None and old != new}
        segments = keys.SEGMENTS.of(group)
        if segments and any(old in segments and new not in segments for old, new in renamed.items()):
            group[keys.SEGMENTS.name] = {renamed.get(name, name): rows for name, rows in segments.items()}
        return renamed


def _names_in(group: dict[str, Any]) -> Sequence[str] | None:
    names: Sequence[str] | None = group.get("param_names")
    return names


def _mismatch(index: int, group: dict[str, Any]) -> str:
    """Return the message of an error about a group with a wrong number of names."""
    params, names = group["params"], group["param_names"]
    shapes = ", ".join(str(tuple(p.shape)) for p in params[:3]) + (", ..." if len(params) > 3 else "")
    return (
        f"group {index} has {len(params)} parameters ({shapes}) and {len(names)} names in param_names, {names[0]!r} first, so "
        "nobody can tell which name belongs to which parameter. Give the group one name for each parameter, or drop the "
        f"names: optimizer.param_groups[{index}].pop('param_names')"
    )


def _move_segments(groups: ParamGroups) -> None:
    """Move segments to the group that their parameter has been moved to."""
    owner = {name: group for group in groups for name in _names_in(group) or ()}
    for group in groups:
        for name in list(keys.SEGMENTS.of(group) or ()):
            to = owner.get(name, group)
            if to is not group:
                rows = group[keys.SEGMENTS.name]
                group[keys.SEGMENTS.name] = {other: rows[other] for other in rows if other != name}
                to[keys.SEGMENTS.name] = {name: rows[name], **(keys.SEGMENTS.of(to) or {})}


def _with_places(names: Sequence[str | None], index: int, taken: set[str]) -> Iterator[str]:
    """Yield names, with a parameter's place instead of a missing name. Add underscores while another parameter has the name."""
    taken = taken | {name for name in names if name is not None}
    for i, name in enumerate(names):
        place = f"{index}.{i}"
        while name is None and place in taken:
            place += "_"
        taken.add(place)
        yield place if name is None else name
