"""Roles of the parameters of well-known module classes that their type and their name do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .specs import RoleSpec

KNOWN: Final[Mapping[str, Mapping[str, RoleSpec]]] = {}


def specs_of(kind: type) -> Mapping[str, RoleSpec] | None:
    return KNOWN.get(kind.__name__)
