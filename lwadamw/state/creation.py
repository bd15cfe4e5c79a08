"""Creation: the state of a parameter is created, laid out in memory, and converted to other storage types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import decay, keys
from .blocks import as_scales, local_scale_shape, scale_shape
from .members import local
from .packing import read_moment, read_weight, write_moment, write_weight
from .storage import ARRAYS, CODES, COMPANIONS, MOMENTS, SCALES, kept_weight, wanted_companion, wanted_dtype

_ASKED_AS = {"max_exp_avg_sq": "exp_avg_sq"}  # the moment whose option says the dtype of another moment


@torch.no_grad()
def create_state(
    state: dict[str, Any],
    p: Tensor,
    group: Mapping[str, Any],
    segments: Sequence[int] = (),
    threshold: Tensor | None = None,
    *,
    split: bool = False,
) -> None:
    """Add the tensors that a group asks for and that a parameter's state does not have yet.

    New arrays are laid out in memory as the parameter is. A companion that exists already is kept: a state with a master
    weight gets no compensation, and a state with a compensation gets no master weight.

    Args:
        state: the state of the parameter, changed in place. `step` is neither read nor written.
        p: the parameter.
        group: its group; `amsgrad`, the storage options and the decay law are read.
        segments: the number of elements of each segment of the whole parameter; () for one segment. Blocks of 8-bit codes may
            not cross segments.
        threshold: the first huber threshold, float32[]. None: it is computed from the weight.
        split: other processes hold other parts of the parameter. Then a threshold is not computed: the next step adds it.
    """
    if decay.is_huber(group) and decay.THRESHOLD not in state and (threshold is not None or not split):
        if threshold is None:
            weight = read_weight(p, state, kept_weight(p, {}, state))
            threshold = decay.threshold_of(weight, keys.HUBER_SCALE.of(group))
        state[decay.THRESHOLD] = threshold
    for key in MOMENTS if group["amsgrad"] else MOMENTS[:2]:
        if key not in state:
            is_max = key == "max_exp_avg_sq"
            dtype = state["exp_avg_sq"].dtype if is_max else wanted_dtype(p, group, key, segments)
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if key in SCALES and state[key].dtype in CODES and SCALES[key] not in state:
            state[SCALES[key]] = _zero_scales(p)
    companion = wanted_companion(p, group)
    if companion is None or "master_param" in state or "kahan_comp" in state:
        return
    if companion == "kahan_comp":
        state[companion] = torch.zeros_like(p, memory_format=torch.preserve_format)
    elif keys.MASTER_WEIGHTS.of(group) == "remainder":
        state[companion] = torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format)
    else:
        state[companion] = p.detach().to(torch.float32, memory_format=torch.preserve_format)


def own_steps(states: Iterable[dict[str, Any]]) -> None:
    """Give every state a step counter of its own. A counter that several states share would count several times in one step.

    Scripts that convert checkpoints often put one tensor into all states.

    Args:
        states: states of different parameters, changed in place.
    """
    taken: set[tuple[Any, Any]] = set()
    for state in states:
        step = state.get("step")
        if isinstance(step, Tensor):
            held = local(step)
            memory = (held.untyped_storage()._cdata, held.storage_offset())
            if memory in taken:
                state["step"] = step.clone()
            taken.add(memory)


@torch.no_grad()
def lay_out(state: dict[str, Any], p: Tensor) -> None:
    """Give every array of a parameter's state the memory layout of the parameter.

    The blocks of 8-bit codes follow memory order, so codes in another layout are decoded, and encoded again to nearest.

    Args:
        state: the state of the parameter, changed in place.
        p: the parameter.
    """
    stride = torch.empty_like(local(p), device="meta").stride()
    for key in ARRAYS:
        if key not in state or local(state[key]).stride() == stride:
            continue
        old, state[key] = state[key], torch.empty_like(p, dtype=state[key].dtype)
        if old.dtype in CODES:
            values = read_moment({**state, key: old}, key)
            write_moment(state, key, torch.empty_like(local(p), dtype=torch.float32).copy_(values))
        else:
            local(state[key]).copy_(local(old))


def _zero_scales(p: Tensor) -> Tensor:
    """Return zeros for the scales of an 8-bit moment; of a DTensor, a DTensor that is sharded as the parameter is."""
    held = local(p)
    shape = scale_shape(p) if held is p else local_scale_shape(p)
    zeros = torch.zeros(shape, dtype=torch.float32, device=held.device)
    return zeros if held is p else as_scales(p, zeros)


def _is_as_asked(moment: Tensor, p: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a moment needs no conversion. To encode codes again would change the last bit of their scales."""
    return moment.dtype == dtype and local(moment).stride() == torch.empty_like(local(p), device="meta").stride()


@torch.no_grad()
def convert_state(
    state: dict[str, Any], p: Tensor, group: Mapping[str, Any], segments: Sequence[int] = (), *, split: bool = False
) -> None:
    """Convert a parameter's state to the storage types that its group asks for. Each value is rounded once, to nearest.

    Moments that have these types already keep every bit.

    Args:
        state: the state of the parameter, changed in place.
        p: the parameter. It is written too if its weight is kept in two arrays.
        group: its group, with the storage options to convert to.
        segments: the number of elements of each segment; () for one segment.
        split: other processes hold other parts of the parameter.
    """
    kept = kept_weight(p, {}, state)
    weight = read_weight(p, state, kept) if kept in ("master", "remainder", "kahan") else None
    amsgrad = "max_exp_avg_sq" in state
    moments = {}
    for key in MOMENTS:
        if key in state and not _is_as_asked(state[key], p, wanted_dtype(p, group, _ASKED_AS.get(key, key), segments)):
            moments[key] = read_moment(state, key)
            for old in (key, SCALES.get(key, key)):
                state.pop(old, None)
    for key in COMPANIONS:
        state.pop(key, None)
    create_state(state, p, {**group, "amsgrad": amsgrad}, segments, split=split)
    for key, values in moments.items():
        write_moment(state, key, values)
    if weight is not None:
        write_weight(p, state, kept_weight(p, {}, state), weight)
