"""Row: one parameter in the tables of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The rounding table's entry for a parameter that draws no random bits; see ROUNDING in kernels/layout.py.
NO_ROUNDING = (0, 0, 0, 0, 0)


@dataclass(slots=True)
class Row:
    """One parameter of a plan. All its tensors are local and dense, and have the same memory layout.

    Args:
        param: the parameter.
        state: the state tensors of the parameter by key, the keys as in state/storage.py.
        step: steps taken so far, float32[] or a number.
        group_index: the parameter's group in the optimizer's `param_groups`.
        segments: number of elements of each segment, in memory order; empty if the parameter is one segment.
        rounding: seed, stream, first, run and stride of the parameter's random bits; see ROUNDING in kernels/layout.py.
        huber_factor: the group's `huber_scale` / number of elements of the whole parameter; None if the group does not decay
            by Huber's law. In one plan, either all rows have a number here or all rows have None.
    """

    param: Tensor
    state: Mapping[str, Tensor]
    step: Tensor | float
    group_index: int
    segments: Sequence[int] = field(default_factory=tuple)
    rounding: Sequence[int] = NO_ROUNDING
    huber_factor: float | None = None


def gather_steps(rows: Sequence[Row], device: torch.device) -> Tensor:
    """Return the steps of all rows as one new tensor. Steps that are on the device are not read by the host.

    Args:
        rows: the rows of a plan.
        device: where the result is.

    Returns:
        float32[n_rows].
    """
    on_host = [not isinstance(row.step, Tensor) or row.step.device.type == "cpu" for row in rows]
    steps = torch.tensor(
        [float(row.step) if here else 0.0 for row, here in zip(rows, on_host, strict=True)],
        dtype=torch.float32,
        device=device,
    )
    for i, row in enumerate(rows):
        if isinstance(row.step, Tensor) and not on_host[i]:
            steps[i].copy_(row.step)
    return steps
