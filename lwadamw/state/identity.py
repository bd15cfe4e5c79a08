"""Comparison of what an optimizer holds, where a tensor equals nothing but itself."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class _Identity(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_identity = _Identity()


def same(these: object, those: object) -> bool:
    """`these == those` for nested lists and tuples, with tensors compared by identity.

    Equality of lists is one C loop that looks at identity first, so it takes a few nanoseconds for what has not changed.
    That of tensors would compare elements, and wait for the device.

    >>> import torch
    >>> a, b = torch.zeros(1), torch.zeros(1)
    >>> same([a, (0.9, 3)], [a, (0.9, 3)]), same([a], [b]), same([0.0], [a])
    (True, False, False)
    """
    with _identity:
        return bool(these == those)
