"""Packed step: the step of one parameter that torch's implementations cannot update as it is stored.

The weight and the moments are unpacked to float32, updated, and packed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..state import decay, packing
from ..state.draws import draw_inputs
from ..state.members import flat, local
from ..state.random_bits import hash_bits, random_bits
from ..state.storage import CODES, MOMENTS
from . import torch_fused_cpu as fused_cpu
from .buckets import Bucket, Entry, follow_threshold
from .torch_norms import moved_sums, square_sums


@torch.no_grad()
def step_packed(entry: Entry, grad: Tensor, bucket: Bucket, norms: bool) -> None:
    """Take the step of one parameter in float32, whatever its storage is.

    Args:
        entry: the parameter. Its state is complete.
        grad: its gradient, in any floating dtype. It is not changed.
        bucket: the options, the gradient factor and the huber decay of this step.
        norms: measure the step and keep the result in `entry.sums`. After the step it could not be computed any more,
            because weights and moments are rounded.
    """
    p, state, kept = entry.member.param, entry.state, entry.kept
    weight = packing.read_weight(p, state, kept)
    before = weight.clone() if norms else weight
    keys_used = MOMENTS if bucket.options["amsgrad"] else MOMENTS[:2]
    moments: dict[str, Tensor] = {key: packing.read_moment(state, key) for key in keys_used if key in state}
    g = torch.empty_like(weight).copy_(local(grad))  # in the memory layout of the weight
    _limit(g, bucket.factor, state)
    _update([weight, g, *moments.values()], state["step"], bucket)
    if bucket.huber_decay is not None:
        decay.shrink(weight, state[decay.THRESHOLD], bucket.huber_decay)
    _pack(entry, weight, moments)
    if not norms and bucket.huber_decay is None:
        return
    after = packing.read_weight(p, state, kept)
    if bucket.huber_decay is not None:
        follow_threshold(entry, after, bucket)
    if norms:
        entry.sums = moved_sums(entry.member, before, after, square_sums(entry.member, g))


def _limit(g: Tensor, factor: Tensor | None, state: Mapping[str, Any]) -> None:
    """Multiply a gradient in place, and limit its elements so that no finite gradient makes a moment inf.

    These are the limits of kernels/adamw.py. An element that is inf or NaN becomes NaN, and a factor that is inf or NaN makes
    every element NaN.

    Args:
        g: float32.
        factor: what to multiply by, one element; None: 1.
        state: the state of the parameter; the dtypes of its moments set the limit.
    """
    half = torch.float16
    limit = 255.875 if state["exp_avg_sq"].dtype == half else 65504.0 if state["exp_avg"].dtype == half else 1.8e19
    if factor is None:
        nan_or_zero = g * 0.0
    else:
        factor = factor.to(g.device)
        nan_or_zero = g * (factor.float() * 0.0)
        torch._foreach_mul_([g], factor)
    g.clamp_(-limit, limit).add_(nan_or_zero)


def _update(arrays: list[Tensor], step: Tensor, bucket: Bucket) -> None:
    """Update weight and moments in float32. `arrays` holds the weight, the gradient and the moments."""
    options = bucket.options
    columns = [[flat(array)] for array in arrays]
    if arrays[0].device.type == "cpu" and options["fused"] is not False and fused_cpu.takes_numbers(options):
        fused_cpu.step(columns, [step], None, options)
    else:
        weight, grad, m, v, *largest = columns
        flags = {"foreach": False, "fused": False}
        adamw(weight, grad, m, v, largest[0] if largest else [], [step], **{**options, **flags})


def _pack(entry: Entry, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Round weight and moments into the parameter and its state."""
    state, kept = entry.state, entry.kept
    bits = random = None
    if kept == "stochastic" or any(state[key].dtype in CODES for key in moments):
        (seed, stream, index), step = draw_inputs(entry.member), int(state["step"])
        bits = hash_bits(index, seed, stream, step)
        random = random_bits(index, seed, stream, step) if kept == "stochastic" else None
    for key, values in moments.items():
        packing.write_moment(state, key, values, bits)
    packing.write_weight(entry.member.param, state, kept, weight, random)
