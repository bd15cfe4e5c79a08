"""The optimizer itself, for methods that are called on an object which wraps it.

Some frameworks wrap an optimizer in an object whose class they derive from the optimizer's class. Fabric copies the
optimizer's `__dict__` into it, and Lightning passes on attributes that it lacks. A method of the optimizer then runs on the
wrapper, and what it assigns would be seen by the wrapper alone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

_Owner = TypeVar("_Owner")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_KEY = "_itself"


def mark(optimizer: Any) -> None:
    """Let objects that wrap an optimizer find it.

    Args:
        optimizer: the optimizer, which nothing wraps yet.
    """
    # A plain reference would be a cycle, and a deleted optimizer would keep its memory until Python collects cycles.
    setattr(optimizer, _KEY, weakref.ref(optimizer))


def itself(optimizer: _Owner) -> _Owner:
    """Return the optimizer that an object is or wraps.

    Args:
        optimizer: an optimizer of this package, or an object whose class derives from its class.
    """
    found = getattr(optimizer, _KEY, None)
    inner: _Owner | None = None if found is None else found()
    return optimizer if inner is None else inner


def on_itself(
    method: Callable[Concatenate[_Owner, _Arguments], _Result],
) -> Callable[Concatenate[_Owner, _Arguments], _Result]:
    """Make a method of an optimizer run on the optimizer itself, and never on an object that wraps it.

    Args:
        method: the method.
    """

    @functools.wraps(method)
    def call(self: _Owner, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return method(itself(self), *args, **kwargs)

    return call  # type: ignore[return-value]
