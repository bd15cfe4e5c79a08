"""torch's fused CPU kernel, used where a group leaves the implementation open.

The kernel makes one pass over memory, where torch.optim.AdamW would loop over a dozen operators. It has three limits:

- It takes every tensor for contiguous and does not check.
- It rounds 16-bit values in another way than the loop over operators does.
- It does not tell autograd that it has written.

So it is used for contiguous float32 and float64 parameters only, and the caller increments the versions of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..state.members import is_fake, local
from ..state.storage import MOMENTS

# Number of elements that are processed at a time where they are read more than once, so that they stay in the CPU's cache.
PIECE = 2**17
_DTYPES = (torch.float32, torch.float64)
_OPTIONS = ("lr", "beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize")


def serves_group(group: Mapping[str, Any]) -> bool:
    """Return whether the kernel may be used for a group: no flag asks for another implementation, no value is a tensor.

    Args:
        group: parameter group.
    """
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"] or group["capturable"]:
        return False
    return takes_numbers({**group, "beta1": group["betas"][0], "beta2": group["betas"][1]})


def takes_numbers(options: Mapping[str, Any]) -> bool:
    """Return whether no hyperparameter is a tensor.

    Args:
        options: keyword arguments of torch's functional `adamw`.
    """
    return not any(isinstance(options[name], Tensor) for name in _OPTIONS)


def serves(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Return whether the kernel can update a parameter with this state, if `is_plain` is true in the step as well.

    Args:
        p: the parameter.
        state: its optimizer state; may be empty.
    """
    if p.device.type != "cpu" or p.dtype not in _DTYPES or local(p) is not p or is_fake(p) or p.is_neg():
        return False
    return all(state[key].dtype == p.dtype and state[key].is_contiguous() for key in MOMENTS if key in state)


def is_plain(p: Tensor, grad: Tensor) -> bool:
    """Return whether parameter and gradient are contiguous, and have the same shape and dtype. This may change in every step.

    The kernel refuses gradients that are negated lazily, as autograd leaves that of an imaginary part with one element.

    Args:
        p: the parameter.
        grad: its gradient.
    """
    alike = p.dtype == grad.dtype and p.shape == grad.shape
    return alike and p.is_contiguous() and grad.is_contiguous() and not grad.is_neg()


@torch.no_grad()
def step(columns: list[list[Tensor]], steps: list[Tensor], factor: Tensor | None, options: Mapping[str, Any]) -> None:
    """Increment the step counters and update the parameters.

    Args:
        columns: lists of equal length: parameters, gradients, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
        steps: step counter of each parameter, float32[].
        factor: multiplies the gradients, one element. The gradients themselves are not changed. None: 1.
        options: effective hyperparameters, `amsgrad` and `maximize`. Other keys are ignored.
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
    # One piece at a time, so that scaled copies of the gradients never need much memory.
    for batch in _batches(zip(steps, *columns, strict=True)):
        some_steps, p, g, *moments = map(list, zip(*batch, strict=True))
        update([p, list(torch._foreach_mul(g, factor)), *moments], some_steps)


def _batches(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield batches of about PIECE elements.

    A row is (step, tensors of one shape...). Long tensors are cut into pieces. Short tensors share a batch.
    """
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
