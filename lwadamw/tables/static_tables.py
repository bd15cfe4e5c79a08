"""Static tables: what the kernels read about the rows of a plan, and what stays the same until a tensor is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout
from ..state.decay import THRESHOLD
from ..state.storage import CODES, SCALES, Storage
from .chunks import cut_segments
from .row import Row


class StaticTables(NamedTuple):
    """Tensors on the plan's device. The first three are explained in chunks.py."""

    chunk_row: Tensor  # int32[n_chunks]
    chunk_span: Tensor  # int64[n_chunks]
    segment_chunk: Tensor  # int32[n_segments + 1]
    # int64[n_arrays, n_rows]: address of every row's parameter, then of its state tensors, 0 where the row has no such
    # tensor. Plans with huber decay have a last line of zeros, for the address of `Thresholds.absolutes`.
    addresses: Tensor
    row_group: Tensor  # int32[n_rows]: index of each row's group
    rounding: Tensor  # int64[ROUNDING, n_rows], or [ROUNDING, 0] if the plan draws no random bits
    strided: bool  # whether some row that draws random bits is a shard whose elements are several separate runs

    @property
    def n_chunks(self) -> int:
        return len(self.chunk_row)

    @property
    def n_segments(self) -> int:
        return len(self.segment_chunk) - 1


def build_static_tables(
    device: torch.device, rows: Sequence[Row], storage: Storage, length: int, *, amsgrad: bool, huber: bool
) -> StaticTables:
    """Build the static tables of a plan.

    Args:
        device: where the tables are, and all tensors of the rows.
        rows: the rows of the plan, at least one.
        storage: how all rows are stored.
        length: number of elements of a full chunk.
        amsgrad: whether some row keeps max_exp_avg_sq.
        huber: whether the rows decay by Huber's law.

    Returns:
        The tables. They hold addresses, so the caller keeps the rows' tensors alive.
    """

    def on_device(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    chunks = cut_segments([row.segments or (row.param.numel(),) for row in rows], length)
    arrays = _state_arrays(storage, amsgrad, huber)
    addresses = np.zeros((1 + len(arrays) + huber, len(rows)), np.int64)
    for i, row in enumerate(rows):
        tensors = (row.param, *(row.state.get(key) for key in arrays))
        addresses[: len(tensors), i] = [0 if t is None else t.data_ptr() for t in tensors]
    drawn = [row.rounding for row in rows] if storage.draws else []
    rounding = np.array(drawn, np.int64).reshape(-1, layout.ROUNDING)
    run, stride = rounding[:, layout.ROUNDING_RUN], rounding[:, layout.ROUNDING_STRIDE]
    return StaticTables(
        on_device(chunks.chunk_row),
        on_device(chunks.chunk_span),
        on_device(chunks.segment_chunk),
        on_device(addresses),
        on_device(np.array([row.group_index for row in rows], np.int32)),
        on_device(np.ascontiguousarray(rounding.T)),
        strided=bool((run != stride).any()),
    )


def _state_arrays(storage: Storage, amsgrad: bool, huber: bool) -> list[str]:
    """Return the keys of the state tensors that the update kernel takes, in the kernel's order."""
    keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    if storage.companion is not None:
        keys.append("kahan_comp" if storage.weight == "kahan" else "master_param")
    keys += [scales for key, scales in SCALES.items() if getattr(storage, key) in CODES]
    return keys + [THRESHOLD] * huber
