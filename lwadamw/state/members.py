"""Members: every parameter of an optimizer with its name, its group, and the tensor that this process holds of it.

An engine may replace parameters, groups and gradients between two steps. So nothing in this module is kept: members are made
again from the groups whenever something has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import keys
from .names import names_of

ParamGroups = Sequence[dict[str, Any]]  # an optimizer's `param_groups`


class Member(NamedTuple):
    """One parameter of an optimizer, and its place there.

    Attributes:
        param: the parameter. It may be a DTensor.
        name: its name, see `names_of`.
        group: the parameter group that contains it.
        group_index: the position of the group in `param_groups`.
        order: the position of the parameter among all parameters of all groups. The first position, if a group has it twice.
        segments: the number of elements of each segment, in memory order. An empty tuple: the parameter is one segment.
    """

    param: Tensor
    name: str
    group: dict[str, Any]
    group_index: int
    order: int
    segments: tuple[int, ...]

    @property
    def gradient(self) -> Tensor | None:
        """The gradient, read from the attribute that the group names."""
        return gradient_of(self.param, keys.GRAD_ATTRIBUTE.of(self.group))

    @property
    def whole_segments(self) -> tuple[int, ...]:
        """The number of elements of each segment of the whole parameter, however it is sharded and laid out in memory."""
        rows, shape = (keys.SEGMENTS.of(self.group) or {}).get(self.name, ()), self.param.shape
        return tuple(n * math.prod(shape[1:]) for n in rows) if shape and sum(rows) == shape[0] else ()

    def segment_names(self) -> list[str]:
        """Return a name per segment: `name[0]`, `name[1]`, and so on, or just `name` for a single segment."""
        return [f"{self.name}[{i}]" for i in range(len(self.segments))] or [self.name]


def local(tensor: Tensor) -> Tensor:
    """Return the tensor that this process holds: the shard of a DTensor, or else the tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


_LOCAL = attrgetter("_local_tensor")
_SPEC = attrgetter("_spec")


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """Return `local` of many tensors. If all of them are DTensors, this is one loop in C."""
    try:
        return list(map(_LOCAL, tensors))
    except AttributeError:
        return list(map(local, tensors))


def specs_of(tensors: Sequence[Any]) -> list[Any] | None:
    """Return the specs of DTensors, which have their placements, in one loop in C; None if some of them is no DTensor."""
    try:
        return list(map(_SPEC, tensors))
    except AttributeError:
        return None


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is one of `FakeTensorMode`, which has a shape and no memory."""
    return type(tensor).__name__ == "FakeTensor"


def wrap_like(p: Tensor, held: Tensor) -> Tensor:
    """Return a local tensor in the form of a parameter. This is the inverse of `local`.

    Args:
        p: the parameter.
        held: a tensor of the same shape as `local(p)`, of any dtype.

    Returns:
        A DTensor with the placements of `p` if `p` is a DTensor, else `held` itself.
    """
    if local(p) is p:
        return held
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())


def gradient_of(p: Tensor, attribute: str) -> Tensor | None:
    """Return the gradient of a parameter from the attribute that its group names, or None if there is no gradient."""
    grad: Tensor | None = p.grad if attribute == "grad" else getattr(p, attribute, None)
    return grad


def gradients_of(params: Sequence[Tensor], attribute: str) -> list[Any]:
    """Return `gradient_of` for many parameters. If the attribute is `grad`, this is a plain list comprehension."""
    if attribute != "grad":
        return [getattr(p, attribute, None) for p in params]
    # Without this, torch looks up `__torch_function__` of every parameter that is a DTensor, which takes twice as long as
    # reading its gradient.
    with torch._C.DisableTorchFunctionSubclass():
        return [p.grad for p in params]


def any_gradient(params: Mapping[str, Sequence[Tensor]]) -> bool:
    """Return whether any parameter has a gradient.

    Args:
        params: parameters by the attribute in which each of them would hold its gradient.
    """
    return any(grad is not None for attribute, some in params.items() for grad in gradients_of(some, attribute))


def split_dimensions(tensor: Any) -> tuple[int, ...]:
    """Return the dimensions of the device mesh along which processes hold different parts of a tensor.

    Every process gets the same answer, also one that holds all elements or none.

    Args:
        tensor: any tensor. One that is no DTensor is whole.
    """
    if local(tensor) is tensor:
        return ()
    mesh = tensor.device_mesh
    # _StridedShard is no subclass of Shard in every version of torch.
    split = [placement.is_shard() or "Shard" in type(placement).__name__ for placement in tensor.placements]
    return tuple(d for d, is_split in enumerate(split) if is_split and mesh.size(d) > 1)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether other processes hold other parts of this tensor."""
    return bool(split_dimensions(tensor))


def is_elsewhere(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor over a device mesh that this process is not in."""
    return local(tensor) is not tensor and tensor.device_mesh.get_coordinate() is None


def is_of_fsdp1(p: Tensor) -> bool:
    """Return whether FullyShardedDataParallel has flattened a parameter."""
    return bool(getattr(p, "_fsdp_flattened", False))


def is_in_memory(tensor: Tensor) -> bool:
    """Return whether the elements of a local tensor are the numbers in memory at its address.

    A view that negates or conjugates lazily has other elements. torch's zero tensors, and subclasses that wrap other tensors,
    have no memory of their own.
    """
    return not (tensor.is_neg() or tensor.is_conj()) and (tensor.numel() == 0 or tensor.data_ptr() != 0)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one stretch of memory without gaps and without overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """Return a one-dimensional view of a dense tensor with its elements in memory order.

    Args:
        tensor: a dense tensor, see `is_dense`. The elements of any other tensor would not be the ones in the view.
    """
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def members_of(groups: ParamGroups) -> Iterator[Member]:
    """Yield a member for every parameter of every group, in the order of the groups.

    A parameter that stands several times in one group is one member: it takes one step, under the name of its first place.

    Args:
        groups: an optimizer's `param_groups`.

    Raises:
        RuntimeError: two groups have the same parameter, so nobody can tell which hyperparameters it has.
    """
    order = count = 0
    found: dict[int, int] = {}  # index of the group, by id() of the parameter
    for group_index, group in enumerate(groups):
        segments = keys.SEGMENTS.of(group) or {}
        for i, (name, p) in enumerate(zip(names_of(group, group_index), group["params"], strict=True)):
            first = found.setdefault(id(p), group_index)
            if first != group_index:
                raise RuntimeError(
                    f"parameter {name!r} {tuple(p.shape)} is in group {first} and in group {group_index}, so it has two sets "
                    "of hyperparameters. Take it out of one of them: "
                    f"optimizer.param_groups[{group_index}]['params'].pop({i})"
                )
            if len(found) > count:
                count = len(found)
                yield Member(p, name, group, group_index, order, _segment_sizes(p, segments.get(name, ())))
            order += 1


def _segment_sizes(p: Tensor, rows: Sequence[int]) -> tuple[int, ...]:
    """Return the elements of each segment, or () if the rows of a segment are not one run of elements in memory.

    The rows of a segment are one run only in a contiguous tensor that is not sharded. Any other tensor stays one segment.
    """
    if not rows or local(p) is not p or not p.is_contiguous() or sum(rows) != p.shape[0]:
        return ()
    return tuple(n * (p.numel() // p.shape[0]) for n in rows)
