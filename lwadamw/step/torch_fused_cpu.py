"""torch's fused CPU kernel, where nobody asked for it: one pass over memory instead of a loop over a dozen operators.

The kernel takes all tensors for contiguous without looking, rounds 16-bit values otherwise than the loop, and writes
behind autograd's back. So it serves contiguous float32 and float64 parameters, and who calls it advances their versions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..state.members import local
from ..state.storage import MOMENTS

PIECE = 2**17  # elements that are worked on at a time where they are read more than once, to stay in a CPU's cache
_DTYPES = (torch.float32, torch.float64)
_OPTIONS = ("lr", "beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize")


def serves_group(group: Mapping[str, Any]) -> bool:
    """Whether a group leaves the choice of implementation open, and has only numbers for hyperparameters."""
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"] or group["capturable"]:
        return False
    return takes_numbers({**group, "beta1": group["betas"][0], "beta2": group["betas"][1]})


def takes_numbers(options: Mapping[str, Any]) -> bool:
    """Whether no hyperparameter is a tensor."""
    return not any(isinstance(options[name], Tensor) for name in _OPTIONS)


def serves(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter with its state may take the kernel, as long as `is_plain` says so too."""
    if p.device.type != "cpu" or p.dtype not in _DTYPES or local(p) is not p:
        return False
    return all(state[key].dtype == p.dtype and state[key].is_contiguous() for key in MOMENTS if key in state)


def is_plain(p: Tensor, grad: Tensor) -> bool:
    """Whether a parameter and its gradient, which may change at every step, are as the kernel takes them to be."""
    return p.dtype == grad.dtype and p.is_contiguous() and grad.is_contiguous()


@torch.no_grad()
def step(columns: list[list[Tensor]], steps: list[Tensor], factor: Tensor | None, options: Mapping[str, Any]) -> None:
    """Advance the steps and take one.

    Args:
        columns: parameters, gradients, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
        steps: float32[] each.
        factor: multiplies the gradients, which stay as they are.
        options: effective hyperparameters, amsgrad and maximize; anything else in it is ignored.
    """
    chosen = {name: options[name] for name in _OPTIONS}

    def update(columns: list[list[Tensor]], steps: list[Tensor]) -> None:
        p, g, m, v, x = columns if len(columns) == 5 else [*columns, []]
        torch._fused_adamw_(p, g, m, v, x, steps, **chosen)

    torch._foreach_add_(steps, 1)
    if factor is None:
        update(columns, steps)
        return
    factor = factor.to(columns[0][0].device)
    # A piece at a time, so that scaled gradients need no memory of their own.
    for batch in _batches(zip(steps, *columns, strict=True)):
        some_steps, p, g, *moments = map(list, zip(*batch, strict=True))
        update([p, list(torch._foreach_mul(g, factor)), *moments], some_steps)


def _batches(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Rows of (step, tensors of one shape...), long tensors cut into pieces and short ones put together to be as long."""
    batch: list[tuple[Tensor, ...]] = []
    size = 0
    for step_, *tensors in rows:
        flat = [t.view(-1) for t in tensors]
        long = flat[0].numel() > PIECE
        for pieces in zip(*(torch.split(t, PIECE) for t in flat), strict=True) if long else [flat]:
            batch.append((step_, *pieces))
            size += pieces[0].numel()
            if size >= PIECE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
