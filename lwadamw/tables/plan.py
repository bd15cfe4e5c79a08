"""Plan: the device tables from which one step is launched, for the parameters of one device and one storage.

There are three kinds of table. They differ in how often they change:
    static    which chunk belongs to which row, addresses of parameters and state: the same until a tensor is replaced
    dynamic   gradient addresses and hyperparameters: sent in one copy when they differ from those of the last step
    results   coefficients, partial sums, norms: the kernels write them

A plan knows tensors and numbers. It knows no optimizer and no model. Nothing in `run` waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import kernels
from ..kernels import layout
from ..state.storage import Storage
from .capture import Capture
from .chunks import chunk_length
from .device_totals import DeviceTotals
from .dynamic_table import DynamicTable
from .launches import Launches, Tables, make_launch
from .request import Header
from .row import Row, gather_steps
from .static_tables import StaticTables, build_static_tables
from .thresholds import Thresholds
from .variants import current_backend, launch_options, update_constants

NO_SPARE: Final = (
    "lwadamw.AdamW: a captured step needs device tables of its own, and nobody has prepared them. Take one uncaptured step "
    "with capturable=True before each capture, and capture one step() in each graph."
)
_NOTHING: Final = nullcontext()


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
        split: whether other processes hold other parts of all rows.
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
        split: bool = False,
    ) -> None:
        self.device, self.storage, self.n_rows = device, storage, len(rows)
        self.device_totals, self._n_groups = device_totals, n_groups
        huber = any(row.huber_factor is not None for row in rows)
        amsgrad = any("max_exp_avg_sq" in row.state for row in rows)
        length = chunk_length(sum(row.param.numel() for row in rows))
        with self.on_device():
            uncounted = torch.zeros_like(device_totals.skipped)
            static = build_static_tables(device, rows, storage, length, amsgrad=amsgrad, huber=huber)
            coefficients = torch.zeros(len(rows), layout.COEFFICIENTS, dtype=torch.float32, device=device)
            self._tables = Tables(
                static,
                device_totals,
                device_totals.square_sums[total_index : total_index + 1],
                device_totals.skipped if counts_skipped else uncounted,
                uncounted,
                gather_steps(rows, device),
                coefficients,
                # The sums of a parameter stay NaN until its first step, because before this step no kernel has read its
                # weight.
                torch.full((static.n_chunks, layout.STATISTICS), float("nan"), dtype=torch.float32, device=device),
                torch.zeros(
                    -(-static.n_chunks // layout.TOTAL_BLOCK) * layout.TOTAL_BLOCK, dtype=torch.float32, device=device
                ),
                _make_thresholds(rows, static, coefficients, split) if huber else None,
            )
            self._constants = update_constants(storage, static.strided, amsgrad, huber)
            self._dynamic = DynamicTable(len(rows), n_groups, device)
        self._launches = Launches(self._tables, self._dynamic, storage, self._constants)
        self._staged = self._launches  # the launches of the step that has been staged
        self._spare: Capture | None = None  # for the next captured step
        self.captures: list[Capture] = []  # of all captured steps so far
        thresholds = () if self._tables.thresholds is None else self._tables.thresholds.tables
        held = (*static, *self._tables, *thresholds, self._dynamic.words)
        device_totals.order.add(table for table in held if isinstance(table, Tensor))

    @property
    def total(self) -> Tensor:
        """float64[1], the square sum of the gradients of this plan."""
        return self._tables.total

    @property
    def steps(self) -> Tensor:
        """float32[n_rows], the number of steps that each row has taken."""
        return self._tables.steps

    def on_device(self) -> AbstractContextManager[object]:
        """Return a context in which the plan's device is the current one, as every launch needs it."""
        if self.device.type == "cpu" or self.device.index == torch.cuda.current_device():
            return _NOTHING
        return torch.cuda.device(self.device)

    def prepare_capture(self) -> None:
        """Allocate what a captured step needs, because nothing can be allocated safely during a capture."""
        if self._spare is None and self.device.type != "cpu":
            dynamic = DynamicTable(self.n_rows, self._n_groups, self.device, captured=True)
            self._spare = Capture(dynamic, Launches(self._tables, dynamic, self.storage, self._constants))

    @property
    def can_capture(self) -> bool:
        """Whether `stage_captured` may be called."""
        return self._spare is not None

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
        self._staged = self._launches

    def stage_captured(self, gradients: list[int], header: Header, kept: Iterable[object]) -> None:
        """Do what `stage` does for a step that is being captured in a CUDA graph.

        Args:
            gradients: as for `stage`.
            header: as for `stage`.
            kept: what else the kernels read at a replay. It is kept alive with this plan.

        Raises:
            RuntimeError: no uncaptured step has prepared tables for this one.
        """
        capture, self._spare = self._spare, None
        if capture is None:
            raise RuntimeError(NO_SPARE)
        self.captures.append(capture)
        capture.kept += kept
        capture.dynamic.set_groups(self._dynamic.groups)
        capture.dynamic.stage(gradients, header)
        self._staged = capture.launches

    def sum_gradients(self) -> None:
        """Write the square sum of this plan's gradients to `total`."""
        self._staged.sum_gradients()

    def run(self, *, clip: bool, norms: bool) -> None:
        """Take the step that has been staged.

        Args:
            clip: whether to clip by the global norm, which is made of the shared square sums.
            norms: whether to measure the sums that `norm_sums` reads.
        """
        self._staged.run(clip=clip, norms=norms)

    @property
    def absolutes(self) -> Tensor | None:
        """float64[n_rows], sums of |w| that have to be added up over processes after each step; None if there are none such."""
        thresholds = self._tables.thresholds
        return thresholds.totals if thresholds is not None and thresholds.split else None

    def follow_thresholds(self, totals: Tensor) -> None:
        """Move the huber thresholds of all rows that took the step.

        Args:
            totals: float64[n_rows], sums of |w| over whole parameters.
        """
        if self.absolutes is not None:
            self.absolutes.copy_(totals)
            self._staged.follow_thresholds()

    def run_row(self, row: int, gradient: int, header: Header, norms: bool) -> None:
        """Take the step of one row alone, from the same tables, without clipping. A skipped step is not counted.

        Args:
            row: index of the row.
            gradient: address of the row's gradient.
            header: the numbers that belong to no row and no group.
            norms: whether to measure the sums that `norm_sums` reads.
        """
        self._dynamic.stage_row(row, gradient, header)
        self._launches.run_row(row, norms)

    def norm_sums(self) -> Tensor:
        """Add up what the last step of each row has measured.

        Returns:
            float64[n_segments, STATISTICS]: square sums of the weight after the step, of the update and of the gradient,
            and the scalar product of the weight before the step with the update.
        """
        tables, static = self._tables, self._tables.static
        with self.on_device():
            self.device_totals.order.follow()
            sums = torch.empty(static.n_segments, layout.STATISTICS, dtype=torch.float64, device=self.device)
            make_launch(
                kernels.norms_kernel, static.n_segments,
                tables.partials, static.segment_chunk, static.chunk_row, tables.coefficients, sums,
            )()  # fmt: skip
        return sums


def _make_thresholds(rows: Sequence[Row], static: StaticTables, coefficients: Tensor, split: bool) -> Thresholds:
    factors = [row.huber_factor or 0.0 for row in rows]
    options = launch_options(current_backend())
    thresholds = Thresholds(factors, static.addresses[-2], coefficients, static.chunk_row, options, split)
    static.addresses[-1] = thresholds.absolutes.data_ptr()
    return thresholds
