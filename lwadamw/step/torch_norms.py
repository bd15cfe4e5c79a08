"""Norms of the torch backend, found out after the step: from weights, moments and gradients as they are.

Each function gives the float64[4] of one parameter that `Norms.from_sums` takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..state import decay, packing
from ..state.members import Member, local
from ..state.storage import kept_weight
from . import torch_fused_cpu as cpu


def resting_sums(member: Member, state: Mapping[str, Any]) -> Tensor:
    """Statistics of a parameter that has not moved."""
    p = member.param
    kept = kept_weight(p, member.group, state)
    whole = p if kept in ("plain", "stochastic") else packing.read_weight(p, state, kept)
    weight = torch.stack([piece.square().sum() for (piece,) in _pieces(whole)]).sum()
    return torch.stack([weight, *torch.zeros_like(weight).expand(3)])


def step_sums(
    member: Member,
    state: Mapping[str, Any],
    options: Mapping[str, Any],
    factor: Tensor | None,
    skipped: Tensor | bool,
    huber: tuple[Tensor, float | Tensor] | None = None,
) -> Tensor:
    """Statistics of the last step, from what it left.

    options: effective hyperparameters the step used
    factor: what it multiplied the gradient with
    skipped: nonzero: it left the parameter alone
    huber: (threshold, lr wd) of the huber decay that came after it
    """
    param, grad = member.param, member.gradient
    lr, beta1, beta2 = (_scalar(options[name], param) for name in ("lr", "beta1", "beta2"))
    shrinkage = lr * options["weight_decay"]
    step = state["step"].to(param.device, torch.float64)
    scale, root = lr / (1 - beta1**step), (1 - beta2**step).sqrt()
    largest = state["max_exp_avg_sq" if options["amsgrad"] else "exp_avg_sq"]
    rows = []
    for p, m, v, g in _pieces(param, state["exp_avg"], largest, param if grad is None else grad):
        u = scale * m / (v.sqrt() / root + options["eps"])
        if huber is None:
            before = (p + u) / (1 - shrinkage)
            change = -shrinkage * before - u
        else:
            before = decay.unshrink(p, *huber) + u
            change = p - before
        rows.append(torch.stack([p.square().sum(), change.square().sum(), g.square().sum(), (before * change).sum()]))
    sums = torch.stack(rows).sum(0)
    sums[2] = float("nan") if grad is None else sums[2] * _scalar(1.0 if factor is None else factor, param) ** 2
    if skipped is not False:
        moved = torch.as_tensor(skipped, device=sums.device) == 0
        sums[1:] = torch.where(moved, sums[1:], torch.zeros_like(sums[1:]))
    return sums


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of every tensor, float64[n], a piece at a time: on a CPU as much as stays in its cache."""
    flat = []
    for tensor in tensors:
        held = local(tensor.detach())
        # By logical order, whatever that in memory.
        flat.append((torch.view_as_real(held) if held.is_complex() else held).reshape(-1))
    size = cpu.PIECE if flat[0].device.type == "cpu" else max(flat[0].numel(), 1)
    for pieces in zip(*(torch.split(t, size) for t in flat), strict=True):
        yield tuple([piece.double() for piece in pieces])


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)
