"""Grouping: which parameters get a row, and which parameters share a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..state import keys
from ..state.creation import create_state, lay_out
from ..state.decay import is_huber
from ..state.members import Member, local
from ..state.shards import Shards
from ..state.storage import FLOATS, STATE, Storage, storage_of


class PlanKey(NamedTuple):
    """What all parameters of one plan have in common.

    Args:
        device: where the parameter is.
        attribute: the attribute of the parameter that holds its gradient, such as "grad".
        storage: how the parameter is stored.
        huber: whether the parameter decays by Huber's law.
        split: the label of how the parameter is split over processes.
    """

    device: torch.device
    attribute: str
    storage: Storage
    huber: bool
    split: str


def split_idle(
    members: Sequence[Member], state: Any, *, trainable: bool
) -> tuple[list[Member], dict[str, list[Tensor]]]:
    """Separate the parameters to update from the idle ones, which have neither a gradient nor state.

    Args:
        members: parameters.
        state: state of each parameter, by parameter.
        trainable: whether a parameter that requires a gradient counts as one to update.

    Returns:
        The members to update, and the idle parameters by the attribute that would hold their gradient.
    """
    busy: list[Member] = []
    idle: dict[str, list[Tensor]] = {}
    for m in members:
        if m.gradient is None and not state.get(m.param) and not (trainable and m.param.requires_grad):
            idle.setdefault(keys.GRAD_ATTRIBUTE.of(m.group), []).append(m.param)
        else:
            busy.append(m)
    return busy, idle


def complete_state(state: dict[str, Any], member: Member, thresholds: Mapping[int, Tensor]) -> None:
    """Create the state that a parameter lacks, and lay its arrays out in memory in the same order as the parameter.

    Args:
        state: state of the parameter; changed in place.
        member: the parameter.
        thresholds: first huber thresholds that other processes had to be asked for, float32[], by id() of the parameter.
    """
    state.setdefault("step", 0.0)
    create_state(state, member.param, member.group, member.whole_segments, thresholds.get(id(member.param)))
    lay_out(state, member.param)


def check_apart(members: Sequence[Member], state: Any) -> None:
    """Raise an error if two tensors that the kernels write to share memory.

    The kernels update all parameters at the same time. Where two of them share memory, both programs would read the old value,
    and one of the two updates would be lost, each time another one.

    Args:
        members: parameters.
        state: state of each parameter, by parameter.

    Raises:
        RuntimeError: some parameter or state tensor begins before another one ends.
    """
    written = [
        (tensor, key, m)
        for m in members
        for key, tensor in (
            ("", m.param),
            *((key, state[m.param][key]) for key in STATE if key in state.get(m.param, {})),
        )
    ]
    held = [local(tensor) for tensor, _, _ in written]
    begins = np.array([t.data_ptr() for t in held], np.int64)
    ends = begins + np.array([t.numel() * t.element_size() for t in held], np.int64)
    order = np.lexsort((ends, begins))
    order = order[begins[order] != 0]
    for i in np.flatnonzero(begins[order][1:] < ends[order][:-1])[:1]:
        (_, key, first), (_, other_key, second) = (written[order[i + n]] for n in (0, 1))
        names = [f"{k} of {m.name!r}" if k else f"{m.name!r}" for k, m in ((key, first), (other_key, second))]
        raise RuntimeError(
            f"{names[0]} {tuple(first.param.shape)} and {names[1]} {tuple(second.param.shape)} share memory, and the kernels "
            "would write to it twice at the same time. Use one parameter in both modules (a.weight = b.weight), give each its "
            "own memory (p.data = p.data.clone()), or use backend='torch', which updates one after the other."
        )


def group_by_plan(members: Sequence[Member], state: Any, shards: Shards) -> dict[PlanKey, list[Member]]:
    """Collect the parameters of each plan.

    Args:
        members: parameters with complete state.
        state: state of each parameter, by parameter.
        shards: says how each parameter is split over processes.

    Returns:
        Members by what they have in common. The plans are sorted by this key, because the global norm is added up in
        the order of plans, and moving parameters between groups must not change this order.
    """
    plans: dict[PlanKey, list[Member]] = {}
    for m in members:
        storage = _kernel_storage(m, state[m.param])
        attribute, split = keys.GRAD_ATTRIBUTE.of(m.group), shards.split_of(m).label
        key = PlanKey(local(m.param).device, attribute, storage, is_huber(m.group), split)
        plans.setdefault(key, []).append(m)
    return {key: plans[key] for key in sorted(plans, key=str)}


def _kernel_storage(member: Member, state: Mapping[str, Any]) -> Storage:
    """Return the storage that the kernels see. A gradient they cannot read is copied to the parameter's dtype first."""
    storage = storage_of(member.param, member.gradient, member.group, state)
    return storage if storage.grad in FLOATS else storage._replace(grad=storage.param)
