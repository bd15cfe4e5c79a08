"""Plan: the device tables from which one step is launched, for the parameters of one device and one storage.

There are three kinds of table. They differ in how often they change:
    static    which chunk belongs to which row, addresses of parameters and state: the same until a tensor is replaced
    dynamic   gradient addresses and hyperparameters: sent in one copy when they differ from those of the last step
    results   coefficients, partial sums, norms: the kernels write them

A plan knows tensors and numbers. It knows no optimizer and no model. Nothing in `run` waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import kernels
from ..kernels import layout
from ..state.storage import Storage
from .chunks import chunk_length
from .device_totals import DeviceTotals
from .dynamic_table import DynamicTable
from .launch import Launch
from .request import Header
from .row import Row, gather_steps
from .static_tables import build_static_tables
from .thresholds import Thresholds
from .variants import TRITON_TYPES, current_backend, launch_options, total_bits, update_constants


class Plan:
    """The tables and the launches for parameters of one device and one storage.

    Args:
        device: where all tensors of all rows are.
        storage: how all rows are stored.
        rows: one entry for each parameter, at least one.
        n_groups: number of the optimizer's groups.
        device_totals: what this plan shares with the other plans of its device.
        total_index: which of the shared square sums is the one of this plan.
        counts_skipped: whether this plan counts the skipped steps. Of all plans, exactly one has to count them.
    """

    def __init__(
        self,
        device: torch.device,
        storage: Storage,
        rows: Sequence[Row],
        *,
        n_groups: int,
        device_totals: DeviceTotals,
        total_index: int = 0,
        counts_skipped: bool = True,
    ) -> None:
        self.device, self.storage, self.n_rows = device, storage, len(rows)
        self.device_totals = device_totals
        self.total = device_totals.square_sums[total_index : total_index + 1]
        # The kernel always counts. What is counted here, nobody reads.
        self._uncounted = torch.zeros_like(device_totals.skipped)
        self._skipped = device_totals.skipped if counts_skipped else self._uncounted

        huber = any(row.huber_scale is not None for row in rows)
        amsgrad = any("max_exp_avg_sq" in row.state for row in rows)
        length = chunk_length(sum(row.param.numel() for row in rows))
        self._static = build_static_tables(device, rows, storage, length, amsgrad=amsgrad, huber=huber)
        self._dynamic = DynamicTable(len(rows), n_groups, device)
        self._constants = update_constants(storage, self._static.strided, amsgrad, huber)

        self.steps = gather_steps(rows, device)
        self._coefficients = torch.zeros(len(rows), layout.COEFFICIENTS, dtype=torch.float32, device=device)
        # The sums of a parameter stay NaN until its first step, because before this step no kernel has read its weight.
        self._partials = torch.full(
            (self._static.n_chunks, layout.STATISTICS), float("nan"), dtype=torch.float32, device=device
        )
        self._thresholds = self._make_thresholds(rows) if huber else None
        self._first_chunk: list[int] | None = None  # [n_rows + 1], made when a row takes its first step alone
        self._row_launches: dict[int, list[Launch]] = {}
        self._prepare_launches()

    def _make_thresholds(self, rows: Sequence[Row]) -> Thresholds:
        factors = [(row.huber_scale or 0.0) / max(row.param.numel(), 1) for row in rows]
        addresses = self._static.addresses
        options = launch_options(current_backend())
        thresholds = Thresholds(factors, addresses[-2], self._coefficients, self._static.chunk_row, options)
        addresses[-1] = thresholds.absolutes.data_ptr()
        return thresholds

    def _launch(
        self,
        kernel: Any,
        programs: int,
        *arguments: Tensor | int,
        options: Mapping[str, Any] | None = None,
        **constants: Any,
    ) -> Launch:
        return Launch(kernel, programs, arguments, constants, options or launch_options(current_backend()))

    def _prepare_launches(self) -> None:
        static = self._static
        self._launch_squares = self._launch(
            kernels.grad_norm_kernel, static.n_chunks,
            static.chunk_row, static.chunk_span, self._dynamic.gradients, self._partials,
            GRAD=TRITON_TYPES[self.storage.grad],
        )  # fmt: skip
        self._launch_total = self._launch(
            kernels.total_kernel, 1, self._partials, self.total, static.n_chunks, BITS=total_bits(static.n_chunks)
        )
        # Indexed by whether the step clips, and by whether it measures norms.
        self._launch_coefficients = [
            self._coefficients_launch(0, self.n_rows, clip, self._skipped) for clip in (False, True)
        ]
        self._launch_update = [self._update_launch(0, static.n_chunks, norms) for norms in (False, True)]
        self._launch_after = () if self._thresholds is None else (self._thresholds.launch(0, self.n_rows),)

    def _coefficients_launch(self, first: int, last: int, clip: bool, skipped: Tensor) -> Launch:
        """Launch the coefficients kernel for rows [first, last), which counts a skipped step in `skipped`."""
        totals = self.device_totals
        return self._launch(
            kernels.coefficients_kernel, -(-(last - first) // layout.ROWS),
            self._dynamic.words, self._static.row_group, self.steps, totals.square_sums, self._coefficients,
            totals.grad_norm, skipped, self.n_rows, len(totals.square_sums), first, last, CLIP=clip,
        )  # fmt: skip

    def _update_launch(self, first: int, last: int, norms: bool) -> Launch:
        """Launch the update kernel for chunks [first, last)."""
        static = self._static
        options = launch_options(current_backend(), self.storage, self._constants["BLOCK"], static.strided)
        return self._launch(
            kernels.adamw_kernel, last - first,
            static.chunk_row, static.chunk_span, static.addresses, self._dynamic.gradients, self._coefficients,
            self._partials, self.steps, static.rounding, self.n_rows, first,
            **self._constants, NORMS=norms, options=options,
        )  # fmt: skip

    def on_device(self) -> AbstractContextManager[object]:
        """Return a context in which the plan's device is the current one, as every launch needs it."""
        if self.device.type == "cpu" or self.device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(self.device)

    def set_groups(self, words: NDArray[np.int64]) -> None:
        """Replace the hyperparameters of every group, from the next `stage` on.

        Args:
            words: int64[n_groups, GROUP], as in kernels/layout.py.
        """
        self._dynamic.set_groups(words)

    def stage(self, gradients: list[int], header: Header) -> None:
        """Tell the device what the next step works on.

        Args:
            gradients: address of each row's gradient, 0 if the row has no gradient.
            header: the numbers that belong to no row and no group.
        """
        self._dynamic.stage(gradients, header)

    def sum_gradients(self) -> None:
        """Write the square sum of this plan's gradients to `total`."""
        self._launch_squares()
        self._launch_total()

    def run(self, *, clip: bool, norms: bool) -> None:
        """Take the step of every row, in two launches. Plans with huber decay need a third one for the thresholds.

        Args:
            clip: whether to clip by the global norm, which is made of the shared square sums.
            norms: whether to measure the sums that `norm_sums` reads.
        """
        self._launch_coefficients[clip]()
        self._launch_update[norms]()
        for launch in self._launch_after:
            launch()

    def run_row(self, row: int, gradient: int, header: Header, norms: bool) -> None:
        """Take the step of one row alone, from the same tables, without clipping. A skipped step is not counted.

        Args:
            row: index of the row.
            gradient: address of the row's gradient.
            header: the numbers that belong to no row and no group.
            norms: whether to measure the sums that `norm_sums` reads.
        """
        self._dynamic.stage_row(row, gradient, header)
        launches = self._row_launches.get(row)
        if launches is None:
            launches = self._row_launches[row] = self._make_row_launches(row)
        launches[0]()
        launches[1 + norms]()
        for launch in launches[3:]:
            launch()

    def _make_row_launches(self, row: int) -> list[Launch]:
        """Make the launches of one row: coefficients, update without norms, update with norms, huber threshold."""
        if self._first_chunk is None:
            rows = torch.arange(self.n_rows + 1, device=self.device)
            self._first_chunk = torch.searchsorted(self._static.chunk_row, rows).tolist()
        first, last = self._first_chunk[row : row + 2]
        launches = [self._coefficients_launch(row, row + 1, False, self._uncounted)]
        launches += [self._update_launch(first, last, norms) for norms in (False, True)]
        if self._thresholds is not None:
            launches.append(self._thresholds.launch(row, 1))
        return launches

    def norm_sums(self) -> Tensor:
        """Add up what the last step of each row has measured.

        Returns:
            float64[n_segments, STATISTICS]: square sums of the weight after the step, of the update and of the gradient,
            and the scalar product of the weight before the step with the update.
        """
        static = self._static
        sums = torch.empty(static.n_segments, layout.STATISTICS, dtype=torch.float64, device=self.device)
        arguments = (self._partials, static.segment_chunk, static.chunk_row, self._coefficients, sums)
        with self.on_device():
            self._launch(kernels.norms_kernel, static.n_segments, *arguments)()
        return sums
