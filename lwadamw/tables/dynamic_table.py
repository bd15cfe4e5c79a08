"""Dynamic table: the numbers that may differ at every step, sent to the device in one copy and only if they do differ."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import layout
from .request import Header
from .upload import CapturedUpload, Upload


class DynamicTable:
    """The header of a step, the gradient address of each row, and the hyperparameters of each group.

    kernels/layout.py says which word of the table holds which number.

    Args:
        n_rows: number of rows of the plan.
        n_groups: number of the optimizer's groups.
        device: where the kernels read the table. It has to be the current device whenever the table is made or staged.
        captured: whether the table is for one step inside a CUDA graph. It can be staged only once.
    """

    def __init__(self, n_rows: int, n_groups: int, device: torch.device, *, captured: bool = False) -> None:
        kind = CapturedUpload if captured else Upload
        self._upload = kind(layout.HEADER + n_rows + n_groups * layout.GROUP, device)
        self._first_group = layout.HEADER + n_rows
        self._gradients: list[int] = []
        self._header = Header()
        self._sent = False  # whether the device has the hyperparameters that the host has

    @property
    def words(self) -> Tensor:
        """int64[HEADER + n_rows + n_groups*GROUP] on the device: the whole table."""
        return self._upload.table

    @property
    def gradients(self) -> Tensor:
        """int64[n_rows + n_groups*GROUP] on the device: the table from the first gradient address on."""
        return self._upload.table[layout.HEADER :]

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64[n_groups*GROUP]: the hyperparameters of every group as the host has them."""
        return self._upload.words[self._first_group :]

    def set_groups(self, words: NDArray[np.int64]) -> None:
        """Replace the hyperparameters of every group on the host. If they differ, the next `stage` sends them to the device.

        Args:
            words: int64[n_groups, GROUP], or the same words in one dimension.
        """
        new = words.reshape(-1)
        if not (self.groups == new).all():
            self.groups[:] = new
            self._sent = False

    def stage(self, gradients: list[int], header: Header) -> None:
        """Make the device see the numbers of the next step. If nothing has changed since the last step, send nothing.

        Args:
            gradients: address of each row's gradient, 0 if the row has no gradient.
            header: the numbers that belong to no row and no group.
        """
        if self._sent and gradients == self._gradients and header == self._header:
            return
        upload = self._upload
        upload.words[layout.HEADER : self._first_group] = gradients
        self._write_header(header)
        upload.send()
        self._gradients, self._sent = gradients, True

    def stage_row(self, row: int, gradient: int, header: Header) -> None:
        """Make the device see the numbers for a step of one row alone.

        Args:
            row: index of the row.
            gradient: address of the row's gradient.
            header: the numbers that belong to no row and no group.
        """
        upload, place = self._upload, layout.HEADER + row
        upload.words[place] = gradient
        if not self._sent:
            self._write_header(header)
            upload.send()
        else:
            if header != self._header:
                self._write_header(header)
                upload.send(0, layout.HEADER)
            upload.send(place, place + 1)
        # No list equals the empty list here, so the next `stage` sends all addresses again.
        self._gradients, self._sent = [], True

    def _write_header(self, header: Header) -> None:
        self._upload.floats[layout.HEADER_MAX_NORM] = header.max_grad_norm
        self._upload.words[layout.HEADER_GRAD_SCALE : layout.HEADER] = (
            header.grad_scale,
            header.found_inf,
            header.regardless,
        )
        self._header = header
