"""The sums of all segments in the order of the parameters, from the sums that each backend and each process has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..state.collectives import Call
from ..state.fingerprint import State
from ..state.members import Member, is_elsewhere, local
from ..state.shards import Shards
from ..state.transfer import moved
from .torch_norms import resting_sums

Table = tuple[Sequence[Member], Tensor]  # parameters, and the sums of their segments


def join_sums(tables: Sequence[Table]) -> tuple[list[tuple[Member, str]], Tensor]:
    """Return the parameter and the name of each of n segments, and float64[n, k] on the device of the first segment.

    A DTensor over a device mesh that this process is not in has no segments here.

    Args:
        tables: parameters, and the sums of their segments, float64[n_segments, k]. One entry for each plan of the Triton
            backend and for each parameter of the torch backend. Without any entry, k is 4.
    """
    if not tables:
        return [], torch.empty(0, 4, dtype=torch.float64, device="cpu")
    if len(tables) == 1 and not any(is_elsewhere(m.param) for m in tables[0][0]):
        ((members, sums),) = tables
        return [(m, name) for m in members for name in m.segment_names()], sums
    pieces: list[tuple[Member, str, Tensor]] = []  # parameter, name, float64[k]
    for members, sums in tables:
        rows = iter(sums.unbind())
        rows_of = [(m, name, next(rows)) for m in members for name in m.segment_names()]
        pieces += [piece for piece in rows_of if not is_elsewhere(piece[0].param)]
    if not pieces:
        return [], tables[0][1][:0]
    pieces.sort(key=lambda piece: piece[0].order)
    device = pieces[0][2].device
    return [(m, name) for m, name, _ in pieces], torch.stack([moved(t, device) for _, _, t in pieces])


def whole_sums(
    tables: Sequence[Table], split: Sequence[Member], state: State, shards: Shards, call: Call
) -> tuple[list[str], Tensor]:
    """Return names and sums of all segments, added up over processes so that they are those of whole parameters.

    This is collective if parameters are split. A parameter that never had a gradient on this process may have taken steps on
    another one. So every process gives a row for every DTensor that is split, with a column that says whether there was a step.

    Args:
        tables: as for `join_sums`, with four columns, of parameters that have taken a step here.
        split: all DTensors of the optimizer that are split over processes.
        state: the optimizer's state by parameter.
        shards: says how each parameter is split over processes.
        call: what the user has called.

    Returns:
        Names and float64[n, 4] of all segments that have taken a step on any process.
    """
    stepped = {id(m.param) for members, _ in tables for m in members}
    resting = [m for m in split if id(m.param) not in stepped]
    marked = [(members, torch.cat([sums, sums.new_ones(len(sums), 1)], dim=1)) for members, sums in tables]
    for m in resting:
        if m.param.requires_grad:
            sums = resting_sums(m, state.get(m.param, {}))
        else:  # frozen on every process, as most weights under LoRA: a pass over them would be for nothing
            sums = torch.full((len(m.segment_names()), 4), torch.nan, dtype=torch.float64, device=local(m.param).device)
        marked.append(([m], torch.cat([sums, sums.new_zeros(len(sums), 1)], dim=1)))
    rows, table = join_sums(marked)
    names, whole = shards.whole_rows(rows, table if rows else table.new_empty(0, 5), call)
    if resting:
        anywhere = whole[:, 4] > 0
        names, whole = [n for n, kept in zip(names, anywhere.tolist(), strict=True) if kept], whole[anywhere]
    return names, whole[:, :4]
