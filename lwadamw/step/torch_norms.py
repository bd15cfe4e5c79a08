"""Norms of the torch backend: statistics of a step, computed after it from weights, moments and gradients.

Statistics of one parameter are a float64[n, 4] with a row for each of its n segments. The columns are those of the table that
`Norms.from_sums` takes: the square sum of the weight after the step, of the update and of the gradient, and the inner product
of the weight before the step with the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..state import decay, packing
from ..state.members import Member, local
from ..state.storage import COMPANIONS, HALVES, kept_weight
from . import torch_fused_cpu as fused_cpu
from .buckets import Bucket, Entry


def sums_of(bucket: Bucket, entry: Entry) -> Tensor:
    """Return the statistics of the last step of one parameter.

    Args:
        bucket: the bucket that the last step updated.
        entry: a parameter of that bucket.

    Returns:
        float64[n, 4], see the top of this file.
    """
    if entry.sums is not None and not bucket.skipped:
        return entry.sums
    if bucket.packed:
        return resting_sums(entry.member, entry.state)
    huber = None if bucket.huber_decay is None or entry.threshold is None else (entry.threshold, bucket.huber_decay)
    return step_sums(entry.member, entry.state, bucket.options, bucket.factor, bucket.skipped, huber)


class HalfNorms:
    """Statistics of the 16-bit parameters of a bucket, from copies of their weights that are taken before the step.

    The moments after a step do not tell what rounding to 16 bits did to the update.

    Args:
        bucket: the bucket that is about to be updated.
        grads: its gradients, before the step.
    """

    def __init__(self, bucket: Bucket, grads: list[Tensor]) -> None:
        self._rows = []
        for entry, grad in zip(bucket.entries, grads, strict=True):
            if entry.member.param.dtype in HALVES:
                factor = _scalar(1.0 if bucket.factor is None else bucket.factor, grad)
                square = square_sums(entry.member, grad)
                before = local(entry.member.param.detach()).clone()
                self._rows.append((entry, before, square * factor**2))

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the statistics after the step, and keep them in `Entry.sums`."""
        for entry, before, grad_square in self._rows:
            entry.sums = moved_sums(entry.member, before, entry.member.param, grad_square)


def square_sums(member: Member, tensor: Tensor) -> Tensor:
    """Return the square sum of each segment of a parameter, float64[n].

    Args:
        member: the parameter.
        tensor: a tensor with as many elements as this process holds of the parameter.
    """
    return _add_up(member, lambda t: (t.square().sum(),), tensor)[:, 0]


def moved_sums(member: Member, before: Tensor, after: Tensor, grad_square: Tensor) -> Tensor:
    """Return the statistics of a step from the weight before and after it.

    Args:
        member: the parameter.
        before: its weight before the step.
        after: its weight after the step.
        grad_square: the square sum of the gradient of each segment, float64[n].

    Returns:
        float64[n, 4], see the top of this file.
    """
    weight, change, dot = _add_up(member, _moved, before, after).unbind(1)
    return torch.stack([weight, change, grad_square, dot], dim=1)


def _moved(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """Return the square sums of the weight after a step and of its change, and the inner product of weight and change."""
    change = after - before
    return after.square().sum(), change.square().sum(), (before * change).sum()


def resting_sums(member: Member, state: Mapping[str, Any]) -> Tensor:
    """Return the statistics of a parameter that did not move in the last step.

    Args:
        member: the parameter.
        state: its optimizer state.

    Returns:
        float64[n, 4]: for each segment the square sum of the weight, and three zeros.
    """
    p = member.param
    # A parameter that has moved to a group with a companion has none before its next step.
    has_companion = any(key in state for key in COMPANIONS)
    whole = packing.read_weight(p, state, kept_weight(p, member.group, state)) if has_companion else p
    weight = square_sums(member, whole)[:, None]
    return torch.cat([weight, weight.new_zeros(len(weight), 3)], dim=1)


def step_sums(
    member: Member,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
    factor: Tensor | None,
    skipped: Tensor | bool,
    huber: tuple[Tensor, float | Tensor] | None = None,
) -> Tensor:
    """Compute the statistics of the last step from the weight, the moments and the gradient after it.

    Args:
        member: the parameter. Its gradient may have been cleared; the third column is NaN then.
        state: its optimizer state after the step.
        options: effective hyperparameters that the step used.
        factor: what the step multiplied the gradient by, one element. None: 1.
        skipped: not zero if the step changed nothing.
        huber: (threshold, lr times weight_decay) of the huber decay that followed the update. None: another decay law.

    Returns:
        float64[n, 4], see the top of this file.
    """
    param, grad = member.param, member.gradient
    lr, beta1, beta2 = (_scalar(options[name], param) for name in ("lr", "beta1", "beta2"))
    shrinkage = lr * options["weight_decay"]
    step = state["step"].to(param.device, torch.float64)
    scale, root = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
    largest = state["max_exp_avg_sq" if options["amsgrad"] else "exp_avg_sq"]

    def of_piece(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        u = scale * m / (v.sqrt() / root + options["eps"])
        if huber is None:
            before = (p + u) / (1 - shrinkage)
            change = -shrinkage * before - u
        else:
            before = decay.unshrink(p, *huber) + u
            change = p - before
        return p.square().sum(), change.square().sum(), g.square().sum(), (before * change).sum()

    sums = _add_up(member, of_piece, param, state["exp_avg"], largest, param if grad is None else grad)
    sums[:, 2] *= math.nan if grad is None else _scalar(1.0 if factor is None else factor, param) ** 2
    if skipped is not False:
        moved = torch.as_tensor(skipped, device=sums.device) == 0
        sums[:, 1:] = torch.where(moved, sums[:, 1:], torch.zeros_like(sums[:, 1:]))
    return sums


def _add_up(member: Member, sums: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Tensor:
    """Return sums over each segment of a parameter.

    Args:
        member: the parameter. A parameter without segments is one segment.
        sums: called with the same elements of every tensor, as float64[n]. It returns k sums over them, float64[] each.
        *tensors: tensors with as many elements as this process holds of the parameter.

    Returns:
        float64[segments, k].
    """
    flat = []
    for tensor in tensors:
        held = local(tensor.detach())
        # reshape follows the logical order of elements. So tensors with different memory layouts match.
        flat.append((torch.view_as_real(held.resolve_conj()) if held.is_complex() else held).reshape(-1))
    count = flat[0].numel()
    per_element = count // max(sum(member.segments), 1)  # a complex element is two numbers
    segments = [size * per_element for size in member.segments] or [count]
    columns = zip(*(torch.split(t, segments) for t in flat), strict=True)
    rows = [[torch.stack(list(sums(*piece))) for piece in _pieces(column)] for column in columns]
    return torch.stack([torch.stack(row).sum(0) for row in rows])


def _pieces(flat: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same elements of every tensor as float64[n], on a CPU one piece at a time so that pieces stay in its cache."""
    size = fused_cpu.PIECE if flat[0].device.type == "cpu" else max(flat[0].numel(), 1)
    for pieces in zip(*(torch.split(t, size) for t in flat), strict=True):
        yield tuple([piece.double() for piece in pieces])


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)
