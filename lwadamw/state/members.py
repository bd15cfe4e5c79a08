"""Members: every parameter of an optimizer with its name, its group, and what this process holds of it.

An engine may replace parameters, groups and gradients between two steps. So nothing here is kept: members are made anew
from the groups whenever something has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import keys
from .names import names_of

ParamGroups = Sequence[dict[str, Any]]  # an optimizer's `param_groups`


class Member(NamedTuple):
    """A parameter where it stands in the optimizer."""

    param: Tensor
    name: str
    group: dict[str, Any]
    group_index: int
    order: int  # among all parameters of all groups
    segments: tuple[int, ...]  # elements of each segment in memory order; (): one segment

    @property
    def gradient(self) -> Tensor | None:
        return gradient_of(self.param, keys.GRAD_ATTRIBUTE.of(self.group))

    def segment_names(self) -> list[str]:
        return [f"{self.name}[{i}]" for i in range(len(self.segments))] or [self.name]


def local(tensor: Tensor) -> Tensor:
    """The tensor this process holds: a DTensor's shard, or the tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def gradient_of(p: Tensor, attribute: str) -> Tensor | None:
    """The gradient of a parameter, where its group says it is kept."""
    grad: Tensor | None = p.grad if attribute == "grad" else getattr(p, attribute, None)
    return grad


def gradients_of(params: Sequence[Tensor], attribute: str) -> list[Any]:
    """`gradient_of` of many, at the cost of a list comprehension where they are in `grad`."""
    return [p.grad for p in params] if attribute == "grad" else [getattr(p, attribute, None) for p in params]


def any_gradient(params: Mapping[str, Sequence[Tensor]]) -> bool:
    """Whether any parameter has a gradient, given by where they would be."""
    return any(grad is not None for attribute, some in params.items() for grad in gradients_of(some, attribute))


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other parts of it."""
    shard = local(tensor)
    return shard is not tensor and shard.numel() != tensor.numel()


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def members_of(groups: ParamGroups) -> Iterator[Member]:
    """Yield every parameter of every group, in their order."""
    order = 0
    for group_index, group in enumerate(groups):
        segments = keys.SEGMENTS.of(group) or {}
        for name, p in zip(names_of(group, group_index), group["params"], strict=True):
            yield Member(p, name, group, group_index, order, _segment_sizes(p, segments.get(name, ())))
            order += 1


def _segment_sizes(p: Tensor, rows: Sequence[int]) -> tuple[int, ...]:
    """Elements per segment. A shard or another memory order has no such runs of elements: it stays whole."""
    if not rows or local(p) is not p or not p.is_contiguous() or sum(rows) != p.shape[0]:
        return ()
    return tuple(n * (p.numel() // p.shape[0]) for n in rows)
