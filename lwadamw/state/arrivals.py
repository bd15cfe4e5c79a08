"""Arrivals: gradients that are still on their way, or that are placed otherwise than their parameter.

Sequence parallelism leaves gradients that every process has a part of the sum of (Partial), and collectives that run behind the
backward leave gradients that have not arrived yet. Both have to become ordinary gradients before anything reads them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .members import local, wrap_like


def arrived(p: Tensor, grad: Tensor, attribute: str) -> Tensor:
    """Return a gradient in the placement of its parameter, after it has arrived. The parameter keeps the result.

    This is collective where the gradient of a DTensor is placed otherwise than the parameter. Nothing happens otherwise.

    Args:
        p: the parameter.
        grad: its gradient.
        attribute: the attribute of the parameter that holds the gradient.
    """
    held: Any = local(grad)
    placed = held is not grad
    moves = placed and local(p) is not p and grad.placements != p.placements  # type: ignore[attr-defined]
    if not moves and not _is_on_its_way(held):
        return grad
    new: Any = grad
    if moves:
        new = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
        held = local(new)
    if _is_on_its_way(held):
        held = held.wait()
        new = wrap_like(new, held) if placed else held
    setattr(p, attribute, new)
    return new  # type: ignore[no-any-return]


def _is_on_its_way(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "AsyncCollectiveTensor"
