"""Gain and alignment of a weight, from the weight before and after a step and a sample of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..state.arrays import Array
from ..state.members import Member
from .inputs import Use, matrix_of

STATISTICS: Final = ("gain", "weight_alignment", "update_alignment", "alignment_ratio", "representation_change")
_SUMS: Final = 6


def sums_of(member: Member, before: Tensor, inputs: Mapping[Use, Tensor]) -> Tensor:
    """Return the sums that the statistics of a parameter and of its segments need.

    Args:
        member: the parameter after the step.
        before: the parameter before the step.
        inputs: the inputs of each matrix that was used, [rows, fan_in].

    Returns:
        float64[1 + segments, 6] with one row for the whole parameter, then one for each of `member.segment_names()`. The
        columns hold the square sums of W, dW, X, W X and dW X, and the number of rows of W over the fan_in. Of several
        matrices, those of W and dW are means over the matrices that were used. NaN where nothing is known.
    """
    if member.param.ndim == 3 and min(use.matrix for use in inputs) >= 0:
        return _of_pack(member, before, inputs)
    (use, x), *_ = inputs.items()
    weight, change, x = _matrices(member, before, use, x)
    with torch.autocast(x.device.type, enabled=False):
        by_row = [_squares(weight, 1), _squares(change, 1), _squares(x @ weight.mT, 0), _squares(x @ change.mT, 0)]
    fan_in = weight.shape[1]
    sizes = [size // fan_in for size in member.segments] or [len(weight)]
    whole = _row([squares.sum() for squares in by_row], x, len(weight))
    if not use.summed and len(sizes) > 1:
        # The rows of this weight are its inputs, and a segment of the inputs has no output of its own.
        return torch.stack([whole, *whole.new_full((len(sizes), _SUMS), float("nan"))])
    parts = zip(*(torch.split(squares, sizes) for squares in by_row), sizes, strict=True)
    return torch.stack([whole, *(_row([p.sum() for p in part], x, size) for *part, size in parts)])


def _of_pack(member: Member, before: Tensor, inputs: Mapping[Use, Tensor]) -> Tensor:
    """Return `sums_of` of a parameter that packs matrices along its first dimension."""
    table = torch.full((len(before), _SUMS), float("nan"), dtype=torch.float64, device=before.device)
    for use, values in inputs.items():
        weight, change, x = _matrices(member, before, use, values)
        with torch.autocast(x.device.type, enabled=False):
            sums = [_squares(t.flatten(), 0) for t in (weight, change, x @ weight.mT, x @ change.mT)]
        table[use.matrix] = _row(sums, x, len(weight))
    per_matrix = before[0].numel()
    sizes = [size // per_matrix for size in member.segments] or [len(before)]
    return torch.stack([_pooled(rows) for rows in (table, *torch.split(table, sizes))])


def _matrices(member: Member, before: Tensor, use: Use, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return one matrix before the step, its change, and its inputs, in the dtype to compute in."""
    dtype = torch.promote_types(torch.promote_types(before.dtype, x.dtype), torch.float32)
    weight = matrix_of(before, use).to(dtype)
    return weight, matrix_of(member.param.detach(), use).to(dtype) - weight, x.to(dtype)


def _row(sums: list[Tensor], x: Tensor, outputs: int) -> Tensor:
    weight, change, y, dy = sums
    ratio = torch.tensor(outputs / x.shape[1], dtype=torch.float64, device=x.device)
    return torch.stack([weight, change, _squares(x.flatten(), 0), y, dy, ratio])


def _pooled(rows: Tensor) -> Tensor:
    """Return the sums of several matrices as one row, float64[6]. Matrices without inputs do not count."""
    used = (~torch.isnan(rows[:, 5])).double()
    count, sums = used.sum(), torch.nan_to_num(rows).sum(dim=0)
    return torch.where(rows.new_tensor([1, 1, 0, 0, 0, 1]) > 0, sums / count, sums) / (count > 0)


def _squares(tensor: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float64)
    return norm.square()


def statistics(sums: Array) -> Array:
    """Return the statistics, float64[n, 5], in the order of STATISTICS. 0/0 is NaN.

    Args:
        sums: float64[n, 6], rows of `sums_of`.
    """
    weight, change, x, y, dy, outputs_per_input = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.sqrt(y / x / outputs_per_input)
        of_weight, of_update = np.sqrt(y / (weight * x)), np.sqrt(dy / (change * x))
        out = np.stack([gain, of_weight, of_update, of_update / of_weight, np.sqrt(dy / y)], axis=1)
    out[~np.isfinite(out)] = np.nan
    return out
