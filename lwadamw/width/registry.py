"""The registry: roles of the parameters of module classes, known by the name of the class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from .known import known_roles
from .patterns import matcher
from .sites import Site
from .specs import RoleSpec, check_spec

_REGISTERED: dict[type[nn.Module] | str, dict[str, RoleSpec]] = {}


def register_role(module: type[nn.Module] | str, roles: Mapping[str, RoleSpec]) -> None:
    """Decide the roles of the parameters of a module class, for every model that has this class.

    Args:
        module: the class, or its name, so that nothing has to be imported. Its subclasses count too.
        roles: for the names of parameters within the module: "matrix", "vector", "output", `Matrix(fan_in=dim)` or
            `Output(fan_in=dim)`. A name is a pattern, as those of `param_groups(roles=...)`, and may reach into the modules
            inside this module. The number -1 stands for the last module of a list. The first pattern that matches counts.

    Raises:
        TypeError: `module` is neither a subclass of torch.nn.Module nor a name.
        ValueError: a role is none of those.

    Examples:
        >>> import torch
        >>> from lwadamw import Matrix
        >>> class Experts(torch.nn.Module): ...
        >>> register_role(Experts, {"w1": Matrix(fan_in=-1), "w2": Matrix(fan_in=-1)})
        >>> register_role("ReadOut", {"last.weight": "output"})
    """
    if not (isinstance(module, str) or (isinstance(module, type) and issubclass(module, nn.Module))):
        raise TypeError(
            f"register_role: {module!r} is not a subclass of torch.nn.Module. Give such a class, or its name."
        )
    if not isinstance(roles, Mapping):
        raise TypeError(f"register_role: roles is {roles!r}. Give a mapping from names within the module to roles.")
    for pattern, spec in roles.items():
        check_spec(spec)
        matcher(pattern)
    _REGISTERED[module] = dict(roles)


class Entry(NamedTuple):
    """What the registry has for a parameter.

    Attributes:
        spec: its role.
        why: where the role comes from, as `summary` prints it.
        by_user: whether a user registered it.
    """

    spec: RoleSpec
    why: str
    by_user: bool


class Registry:
    """Looks up the roles of parameters in what users registered and in what the package knows."""

    def __init__(self) -> None:
        self._by_class: dict[type, list[tuple[str, Mapping[str, RoleSpec], bool]]] = {}

    def find(self, site: Site) -> Entry | None:
        """Return what the registry has for a parameter; None where it has nothing.

        What a user registered comes before what the package knows, and an inner module before an outer one.

        Args:
            site: where the parameter sits.
        """
        known = None
        for depth in range(len(site.trail) - 1, -1, -1):
            for name, roles, by_user in self._of(type(site.trail[depth])):
                if known is not None and not by_user:
                    continue
                spec = _spec(roles, site, depth) if roles else None
                if spec is not None and by_user:
                    return Entry(spec, f"register_role({name})", True)
                if spec is not None:
                    known = Entry(spec, f"known: {name}", False)
        return known

    def _of(self, cls: type) -> list[tuple[str, Mapping[str, RoleSpec], bool]]:
        """Return what is registered for a class and its base classes: name of the class, roles, and whether by a user."""
        if cls not in self._by_class:
            bases = cls.__mro__
            self._by_class[cls] = [
                *((c.__name__, _REGISTERED[key], True) for c in bases for key in (c, c.__name__) if key in _REGISTERED),
                *((c.__name__, roles, False) for c in bases if (roles := known_roles(c))),
            ]
        return self._by_class[cls]


def _spec(roles: Mapping[str, RoleSpec], site: Site, depth: int) -> RoleSpec | None:
    """Return the role that the first matching pattern gives to a parameter, by its name within the module at a depth."""
    path = site.path[depth:]
    counted = [
        "-1" if name.isdigit() and name == next(reversed(holder._modules)) else name
        for name, holder in zip(path, site.trail[depth:], strict=False)
    ]
    names = {".".join((*path, site.attribute)), ".".join((*counted, site.attribute))}
    return next((spec for pattern, spec in roles.items() if any(map(matcher(pattern), names))), None)
