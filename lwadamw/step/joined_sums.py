"""The sums of all segments in the order of the parameters, from the sums that each backend has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..state.members import Member


def join_sums(tables: Sequence[tuple[Sequence[Member], Tensor]]) -> tuple[list[tuple[Member, str]], Tensor]:
    """Return the parameter and the name of each of n segments, and float64[n, 4] on the device of the first segment.

    Args:
        tables: parameters, and the sums of their segments, float64[n_segments, 4]. One entry for each plan of the Triton
            backend and for each parameter of the torch backend.
    """
    if not tables:
        return [], torch.empty(0, 4, dtype=torch.float64, device="cpu")
    if len(tables) == 1:
        ((members, sums),) = tables
        return [(m, name) for m in members for name in m.segment_names()], sums
    pieces: list[tuple[Member, str, Tensor]] = []  # parameter, name, float64[4]
    for members, sums in tables:
        rows = iter(sums.unbind())
        pieces += [(m, name, next(rows)) for m in members for name in m.segment_names()]
    pieces.sort(key=lambda piece: piece[0].order)
    device = pieces[0][2].device
    return [(m, name) for m, name, _ in pieces], torch.stack([t.to(device, non_blocking=True) for _, _, t in pieces])
