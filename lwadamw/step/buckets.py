"""Buckets of the torch backend: which parameters share one call of torch's AdamW.

Parameters share a call if their effective hyperparameters and flags agree, however many groups they come from.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..state import decay, keys
from ..state.arrivals import arrived
from ..state.checks import check_gradient
from ..state.draws import rounding_row
from ..state.geometry import Geometry
from ..state.groups import effective
from ..state.identity import same
from ..state.members import Member, any_gradient, gradient_of, gradients_of, is_fake, local
from ..state.storage import storage_of
from . import torch_fused_cpu as fused_cpu
from .torch_paths import Path, check_group, leaves_open, path_of

_FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")
_ARGUMENTS = ("lr", "weight_decay", "eps", "beta1", "beta2", *_FLAGS)


Needs = tuple[bool, bool, bool, bool, str]  # see `Entry.completed_for`


@dataclass(slots=True)
class Entry:
    """A parameter of the torch backend and its state.

    Args:
        member: the parameter.
        state: its optimizer state, the dict that the optimizer holds.
        address: data_ptr() of the parameter, if torch's fused CPU kernel can update it at this address as far as the
            parameter and its state are concerned. None: it cannot. The group and the gradient are checked elsewhere.
        completed_for: what the state was completed for: amsgrad, step on the device, huber decay, packed, kept. None:
            not yet.
        kept: how the weight is kept: "plain", "master", "remainder", "kahan" or "stochastic". See state/storage.py.
        sums: statistics of the last step, float64[segments, 4], if the step itself measured them. None: they are computed
            when norms are read.
        threshold: huber threshold that the last step used, float32[].
        absolute: sum of |w| after the last step over what this process holds, float64[], if the huber threshold still has to
            follow the whole parameter, of which other processes hold other parts.
    """

    member: Member
    state: dict[str, Any]
    address: int | None
    completed_for: Needs | None = None
    kept: str = "plain"
    sums: Tensor | None = None
    threshold: Tensor | None = None
    absolute: Tensor | None = None


@dataclass
class Bucket:
    """Parameters that one call of torch's AdamW updates.

    Args:
        options: keyword arguments of torch's functional `adamw`: effective hyperparameters and flags.
        attribute: attribute of a parameter that holds its gradient.
        implicit_fused: torch's fused CPU kernel updates these parameters, although their group leaves `fused` open.
        packed: torch's implementations cannot update these parameters as they are stored. See packed_step.py.
        huber_decay: decay of one step, lr times weight_decay, of a group with decay="huber". None: another decay law; the
            decay is part of torch's update.
        groups: the indices of the groups that the parameters belong to.
        entries: the parameters.
        grads: gradients of this step, one per entry. Empty after the step, so that no gradient is kept alive.
        factor: what the last step multiplied the gradients by, one element. None: 1.
        skipped: not zero if the last step changed nothing.
        split: id() of each parameter of which other processes hold other parts, among those with huber decay.
        looked: geometry of the gradients of a packed bucket when it was filled. None: the bucket has to be filled at every
            step.
    """

    options: dict[str, Any]
    attribute: str
    implicit_fused: bool
    packed: bool
    huber_decay: float | Tensor | None
    groups: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    factor: Tensor | None = None
    skipped: Tensor | bool = False
    split: Container[int] = ()
    looked: Geometry | None = None

    @property
    def fused(self) -> bool:
        """Whether the group asks for torch's fused kernel and the kernel can update the parameters as they are stored."""
        return bool(self.options["fused"]) and not self.packed

    def params(self) -> list[Tensor]:
        """Return the parameters."""
        return [entry.member.param for entry in self.entries]

    def column(self, key: str) -> list[Tensor]:
        """Return the state tensors of one state key, one per entry."""
        return [entry.state[key] for entry in self.entries]


def follow_threshold(entry: Entry, weight: Tensor, bucket: Bucket, skipped: Tensor | None = None) -> None:
    """Move the huber threshold of a parameter after a step, or keep what it needs until other processes have been asked.

    Args:
        entry: the parameter.
        weight: what this process holds of the weight after the step.
        bucket: the bucket of the parameter.
        skipped: nonzero on the device if the step was skipped; None: the step was taken.
    """
    if id(entry.member.param) in bucket.split:
        entry.absolute = decay.absolute_sum(weight)
    else:
        target = decay.threshold_of(weight, keys.HUBER_SCALE.of(entry.member.group))
        decay.follow(entry.state[decay.THRESHOLD], target, skipped)


def fill_buckets(
    members: Iterable[Member], groups: Sequence[dict[str, Any]], state: Any, entries: dict[int, Entry]
) -> tuple[list[Bucket], dict[str, list[Tensor]]]:
    """Sort the parameters that have a gradient into buckets.

    Args:
        members: parameters of the torch backend.
        groups: the optimizer's parameter groups.
        state: the optimizer's state by parameter.
        entries: entries of earlier steps, by the parameter's order. Entries of new parameters are added.

    Returns:
        The buckets, and the parameters that have no gradient, by the attribute that would hold it.

    Raises:
        RuntimeError: a gradient is sparse or has another shape than its parameter, torch cannot update a parameter (see
            torch_paths.py), or it draws random bits and is sharded in a way that state/runs.py cannot describe.
        TypeError: a hyperparameter is neither a number nor a tensor of one element.
    """
    without_gradient: dict[str, list[Tensor]] = {}
    buckets: dict[tuple[Any, ...], Bucket] = {}  # by everything that one call must agree in
    by_group: dict[tuple[int, Path, bool], Bucket] = {}  # so that hyperparameters are computed once per group
    fused_groups: dict[int, bool] = {}  # whether torch's fused CPU kernel may be used, by the index of the group
    # A framework may have replaced the group dict by a copy. So do not use the member's own group.
    listed = [m if m.group is groups[m.group_index] else m._replace(group=groups[m.group_index]) for m in members]
    attributes = [keys.GRAD_ATTRIBUTE.of(m.group) for m in listed]
    there = arrived((m.param, gradient_of(m.param, a), a) for m, a in zip(listed, attributes, strict=True))
    for m, attribute, grad in zip(listed, attributes, there, strict=True):
        p, group = m.param, m.group
        if grad is None:
            without_gradient.setdefault(attribute, []).append(p)
            continue
        check_gradient(m, grad)
        if grad.is_conj():
            grad = grad.resolve_conj()  # torch's AdamW takes complex numbers for pairs, and a lazy conjugate is none
        entry = entries.get(m.order)
        if entry is None or (entry.address is not None and entry.address != p.data_ptr()):
            entry = entries[m.order] = Entry(m, state[p], p.data_ptr() if fused_cpu.serves(p, state[p]) else None)
        entry.member, entry.sums, entry.absolute = m, None, None
        if m.group_index not in fused_groups:
            check_group(group, m.group_index)
            fused_groups[m.group_index] = fused_cpu.serves_group(group)
        storage = storage_of(p, grad, group, entry.state, m.whole_segments)
        entry.kept = storage.weight
        if storage.draws and entry.completed_for is None:
            rounding_row(m)  # raises an error before anything is written
        path = path_of(m, grad, group, entry.state, storage)
        if path == "asked" and grad.dtype != p.dtype:
            grad = grad.to(p.dtype)
        if (
            path == "asked"
            and fused_groups[m.group_index]
            and entry.address is not None
            and fused_cpu.is_plain(p, grad)
        ):
            path = "fused"
        place = (m.group_index, path, p.device.type == "cpu")
        bucket = by_group.get(place)
        if bucket is None:
            bucket = by_group[place] = _bucket_for(group, attribute, path, p.device.type == "cpu", buckets)
            bucket.groups.append(m.group_index)
        bucket.entries.append(entry)
        bucket.grads.append(grad)
    for bucket in buckets.values():
        if bucket.packed and fused_cpu.takes_numbers(bucket.options):
            plain = all(local(g) is g and g.layout == torch.strided and not is_fake(g) for g in bucket.grads)
            bucket.looked = Geometry(bucket.grads) if plain else None
    return list(buckets.values()), without_gradient


def _bucket_for(
    group: Mapping[str, Any], attribute: str, path: Path, on_cpu: bool, buckets: dict[tuple[Any, ...], Bucket]
) -> Bucket:
    """Return the bucket whose values agree with those of a group. Create it if there is none."""
    numbers, huber_decay = _numbers_of(group)
    flags = {flag: group[flag] for flag in _FLAGS}
    if path == "loop":
        flags |= {"fused": False, "foreach": False}
    if on_cpu:
        flags["capturable"] = False  # nothing captures a CPU, and torch's loop would refuse
    values = (*numbers, *flags.values())
    new = Bucket(dict(zip(_ARGUMENTS, values, strict=True)), attribute, path == "fused", path == "packed", huber_decay)
    return buckets.setdefault((attribute, path, on_cpu, huber_decay, *values), new)


def _numbers_of(group: Mapping[str, Any]) -> tuple[tuple[float | Tensor, ...], float | Tensor | None]:
    """Return the first five of `_ARGUMENTS`, and `Bucket.huber_decay`."""
    used, huber_decay = effective(group), None
    if decay.is_huber(group):
        huber_decay, used = used.lr * used.weight_decay, used._replace(weight_decay=0.0)
    numbers = (*used, *group["betas"])
    if leaves_open(group):
        # torch would compute 1 - lr * weight_decay in the 16 bits of a tensor.
        numbers = tuple(v.float() if isinstance(v, Tensor) and v.dtype.itemsize < 4 else v for v in numbers)
    return numbers, huber_decay


def follow_values(buckets: Sequence[Bucket], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Give the buckets of the last step the learning rates and weight decays that their groups have now.

    Args:
        buckets: the buckets of the last step, from `fill_buckets`.
        groups: the optimizer's parameter groups. Only numbers have changed since.

    Returns:
        False if the groups of a bucket do not agree any more, so that the buckets have to be filled again.

    Raises:
        ValueError: as in `effective`.
    """
    for bucket in buckets:
        first, *others = [_numbers_of(groups[i]) for i in bucket.groups]
        if not all(same(other, first) for other in others):
            return False
        numbers, bucket.huber_decay = first
        bucket.options |= zip(_ARGUMENTS, numbers, strict=False)
    return True


def refill_buckets(buckets: Sequence[Bucket], without_gradient: Mapping[str, Sequence[Tensor]]) -> bool:
    """Give the buckets of the last step the gradients of this step, if each parameter certainly keeps its path.

    This is the fast path of a step in which nothing has changed but gradients and numbers. It serves torch's fused CPU kernel
    and packed parameters.

    Args:
        buckets: the buckets of the last step, from `fill_buckets`.
        without_gradient: parameters that had no gradient in the last step, from `fill_buckets`.

    Returns:
        False if the buckets have to be filled again. Nothing has been changed then.
    """
    if not all(bucket.implicit_fused or bucket.looked is not None for bucket in buckets):
        return False
    if any_gradient(without_gradient):
        return False
    grads: list[list[Any]] = []
    for bucket in buckets:
        params = bucket.params()
        grads.append(gradients_of(params, bucket.attribute))
        try:
            if bucket.looked is not None:
                moved = not bucket.looked.holds(grads[-1])
            else:
                moved = list(map(Tensor.data_ptr, params)) != [entry.address for entry in bucket.entries]
            if moved or (bucket.implicit_fused and not all(map(fused_cpu.is_plain, params, grads[-1]))):
                return False
        except (AttributeError, RuntimeError):
            return False  # a gradient is missing or sparse
    for bucket, new in zip(buckets, grads, strict=True):
        bucket.grads, bucket.skipped = new, False
        if bucket.packed:
            for entry in bucket.entries:
                entry.sums = entry.absolute = None
    return True
