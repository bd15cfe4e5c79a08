"""Comparison of nested lists in which a tensor equals only itself, and copies of what can be edited in place."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch.overrides import TorchFunctionMode


class _Identity(TorchFunctionMode):
    """While this mode is active, every torch function returns False, `==` of tensors included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_identity = _Identity()
_CONTAINERS = (list, tuple, dict)


def same(these: object, those: object) -> bool:
    """Return whether two nested lists or tuples are equal, with tensors compared by identity.

    Python compares two lists in one C loop, and the loop looks at the identity of two elements before it calls `==`. So
    an element that has not changed costs a few nanoseconds. Without this function, `==` of two different tensors would
    compare their elements and wait for the device.

    Args:
        these: a list or tuple of numbers, strings, tensors, and lists or tuples of these.
        those: what `these` is compared with.

    Examples:
        >>> import torch
        >>> a, b = torch.zeros(1), torch.zeros(1)
        >>> same([a, (0.9, 3)], [a, (0.9, 3)]), same([a], [b]), same([0.0], [a])
        (True, False, False)
    """
    with _identity:
        return bool(these == those)


def snapshot(values: Iterable[Any]) -> list[Any]:
    """Return a list of values in which every list and every dict is a copy, at any depth.

    A list that is edited in place is still the same object. So what `same` is to compare later has to be a copy. All other
    objects are kept as they are.

    Args:
        values: numbers, strings, tensors, and lists, tuples or dicts of these.

    Examples:
        >>> betas = [0.9, 0.99]
        >>> seen = snapshot([1e-3, betas])
        >>> betas[1] = 0.5
        >>> same([1e-3, betas], seen)
        False
    """
    return [_copied(value) if isinstance(value, _CONTAINERS) else value for value in values]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(zip(value, snapshot(value.values()), strict=True))
    copy = snapshot(value)
    if not isinstance(value, tuple):
        return copy
    # A tuple of objects that are no lists cannot change. Comparing it with itself is much faster than with a copy.
    return value if all(map(is_, copy, value)) else tuple(copy)
