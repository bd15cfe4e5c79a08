"""Geometry: shapes, strides, dtypes and devices of many tensors, compared with what they were in one C loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .members import local

# How often a geometry remakes its guard. A guard also depends on requires_grad and on the dispatcher's state, for instance
# on autocast. So a guard may fail although no tensor has changed.
_REMAKES = 8
_shape, _dtype, _device, _layout = map(attrgetter, ("shape", "dtype", "device", "layout"))


def look(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, strides, dtype, device and layout of what this process holds of a tensor, and whether it is negated lazily.

    Somebody may shrink a tensor, or give it another dtype, and leave it at its address. The look shows it.

    Args:
        tensor: a tensor of any layout.
    """
    held = local(tensor)
    strides = held.stride() if held.layout == torch.strided else ()
    return held.shape, strides, held.dtype, held.device, held.layout, held.is_neg()


class Geometry:
    """Type, shape, strides, dtype and device of each tensor of a list, and whether it is negated lazily.

    An address says where a tensor begins. Only its geometry says where it ends. So tables and kernels that were made for some
    tensors may be used again only as long as the addresses and the geometry are the same.

    Args:
        tensors: strided tensors without wrappers: of a DTensor, give the local tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._described = _describe(tensors)
        self._guard = _make_guard(tensors)
        self._remakes = 0

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Return whether tensors have the geometry that the tensors of the constructor had.

        Args:
            tensors: as many tensors as the constructor was given. None in place of a tensor gives False.
        """
        if self._guard is not None and self._guard(*tensors):
            return True
        try:
            if _describe(tensors) != self._described:
                return False
        except (AttributeError, TypeError, RuntimeError):
            return False  # a tensor is missing, or is not strided
        if self._remakes < _REMAKES:
            self._remakes += 1
            self._guard = _make_guard(tensors)
        return True


def _describe(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    return (
        list(map(type, tensors)),
        list(map(_layout, tensors)),
        list(map(_shape, tensors)),
        list(map(Tensor.stride, tensors)),
        list(map(_dtype, tensors)),
        list(map(_device, tensors)),
        list(map(Tensor.is_neg, tensors)),
    )


def _make_guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return a function that is true only for tensors of the same geometry. None if this build of torch has none."""
    return _new_guard(tensors) if tensors and _guards_work() else None


def _new_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    # torch.compile decides with these guards whether it may run a compiled graph again. A guard costs about as much as
    # asking every tensor for its address. Describing every tensor in Python objects costs five times as much.
    from torch._C._dynamo.guards import TensorGuards

    sizes: list[Any]
    strides: list[Any]
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


@cache
def _guards_work() -> bool:
    """Return whether torch's guards tell geometries apart. They belong to no public interface, so they are tried first."""
    tensor = torch.zeros(4, 4, device="cpu")
    others = (
        tensor[:2],
        tensor.view(2, 8),
        tensor.as_strided((4, 4), (1, 4)),
        tensor.view(torch.int32),
        tensor.to("meta"),
        None,
    )
    try:
        guard = _new_guard([tensor])
        return guard(tensor) and not any(guard(other) for other in others)
    except Exception:
        return False
