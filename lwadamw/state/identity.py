"""Comparison of nested lists in which a tensor equals only itself."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class _Identity(TorchFunctionMode):
    """While this mode is active, every torch function returns False, `==` of tensors included."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_identity = _Identity()


def same(these: object, those: object) -> bool:
    """Return whether two nested lists or tuples are equal, with tensors compared by identity.

    Python compares two lists in one C loop, and the loop looks at the identity of two elements before it calls `==`. So
    an element that has not changed costs a few nanoseconds. Without this function, `==` of two different tensors would
    compare their elements and wait for the device.

    Args:
        these: a list or tuple of numbers, strings, tensors, and lists or tuples of these.
        those: what `these` is compared with.

    Example:
        >>> import torch
        >>> a, b = torch.zeros(1), torch.zeros(1)
        >>> same([a, (0.9, 3)], [a, (0.9, 3)]), same([a], [b]), same([0.0], [a])
        (True, False, False)
    """
    with _identity:
        return bool(these == those)
