"""Arrivals: gradients that are still on their way, or that are placed otherwise than their parameter.

Sequence parallelism leaves gradients that every process has a part of the sum of (Partial), and collectives that run behind the
backward leave gradients that have not arrived yet. Both have to become ordinary gradients before anything reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .members import local, wrap_like


def arrived(gradients: Iterable[tuple[Tensor, Tensor | None, str]]) -> list[Any]:
    """Return gradients in the placements of their parameters, after they have arrived. The parameters keep the results.

    This is collective where the gradient of a DTensor is placed otherwise than the parameter. All such collectives start before
    the first one is waited for. Nothing happens to other gradients.

    Args:
        gradients: parameter, its gradient or None, and the attribute of the parameter that holds the gradient, in an order on
            which all processes agree.

    Returns:
        The gradients in the same order.
    """
    given = list(gradients)
    started = [None if grad is None else _started(p, grad) for p, grad, _ in given]
    return [
        None if new is None else _kept(p, grad, new, attribute)
        for (p, grad, attribute), new in zip(given, started, strict=True)
    ]


def placed_like(p: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient in the placement of its parameter, which keeps the gradient that it has.

    This is collective if the gradient of a DTensor is placed otherwise than the parameter.

    Args:
        p: the parameter.
        grad: its gradient. It may be on its way.
    """
    new = _started(p, grad)
    held: Any = local(new)
    return wrap_like(p, held.wait()) if _is_on_its_way(held) else new


def _started(p: Tensor, grad: Any) -> Any:
    """Return a gradient in the placement of its parameter. It may still be on its way."""
    placed = local(grad) is not grad and local(p) is not p
    if not placed or grad.placements == p.placements:  # type: ignore[attr-defined]
        return grad
    return grad.redistribute(p.device_mesh, p.placements, async_op=True)  # type: ignore[attr-defined]


def _kept(p: Tensor, grad: Any, new: Any, attribute: str) -> Any:
    """Wait for a gradient, and give it to its parameter if it is another object than before."""
    held: Any = local(new)
    if _is_on_its_way(held):
        waited = held.wait()
        new = waited if held is new else wrap_like(new, waited)
    if new is not grad:
        setattr(p, attribute, new)
    return new


def _is_on_its_way(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "AsyncCollectiveTensor"
