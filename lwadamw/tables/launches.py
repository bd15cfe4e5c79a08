"""Launches: the launches of a step that read one dynamic table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import layout
from ..state.storage import Storage
from .device_totals import DeviceTotals
from .dynamic_table import DynamicTable
from .launch import Launch
from .static_tables import StaticTables
from .thresholds import Thresholds
from .variants import TRITON_TYPES, current_backend, launch_options, total_bits


class Tables(NamedTuple):
    """The tables of a plan, all but the dynamic table."""

    static: StaticTables
    device_totals: DeviceTotals
    total: Tensor  # float64[1]: square sum of the gradients of this plan
    skipped: Tensor  # int64[], number of skipped steps
    uncounted: Tensor  # int64[]. The kernel always counts. What is counted here, nobody reads.
    steps: Tensor  # float32[n_rows], steps taken by each row
    coefficients: Tensor  # float32[n_rows, COEFFICIENTS]
    partials: Tensor  # float32[n_chunks, STATISTICS]
    norms: Tensor  # float32[n_blocks * TOTAL_BLOCK], the norm of each chunk's gradient, used by steps that clip
    thresholds: Thresholds | None  # only with huber decay


class Launches:
    """All launches that read one dynamic table.

    Args:
        tables: the other tables of the plan.
        dynamic: the dynamic table.
        storage: how all rows of the plan are stored.
        constants: the compile-time constants of the update kernel, all but NORMS.
    """

    def __init__(self, tables: Tables, dynamic: DynamicTable, storage: Storage, constants: Mapping[str, Any]) -> None:
        self._tables, self._dynamic, self._storage, self._constants = tables, dynamic, storage, constants
        static, self._n_rows = tables.static, len(tables.steps)
        self._squares = make_launch(
            kernels.grad_norm_kernel, static.n_chunks,
            static.chunk_row, static.chunk_span, dynamic.gradients, tables.norms,
            GRAD=TRITON_TYPES[storage.grad],
        )  # fmt: skip
        self._total = make_launch(
            kernels.total_kernel, 1, tables.norms, tables.total, len(tables.norms) // layout.TOTAL_BLOCK,
            BITS=total_bits(static.n_chunks),
        )  # fmt: skip
        # Indexed by whether the step clips, and by whether it measures norms.
        self._coefficients = [
            self._coefficients_launch(0, self._n_rows, clip, tables.skipped) for clip in (False, True)
        ]
        self._update = [self._update_launch(0, static.n_chunks, norms) for norms in (False, True)]
        thresholds = tables.thresholds
        self._after = () if thresholds is None else (thresholds.launch(0, self._n_rows),)
        self._sum_absolutes = None if thresholds is None or not thresholds.split else thresholds.launch_totals()
        self._first_chunk: list[int] | None = None  # [n_rows + 1], made when a row takes its first step alone
        self._row_launches: dict[int, list[Launch]] = {}

    def sum_gradients(self) -> None:
        """Write the square sum of the plan's gradients to `total`."""
        self._squares()
        self._total()

    def run(self, *, clip: bool, norms: bool) -> None:
        """Take the step of every row, in two launches. Plans with huber decay need a third one for the thresholds.

        If their parameters are split over processes, the third launch writes sums, and `follow_thresholds` is to be called.

        Args:
            clip: whether to clip by the global norm, which is made of the shared square sums.
            norms: whether to measure the sums that `Plan.norm_sums` reads.
        """
        self._coefficients[clip]()
        self._update[norms]()
        if self._sum_absolutes is not None:
            self._sum_absolutes()
        else:
            self.follow_thresholds()

    def follow_thresholds(self) -> None:
        """Move the huber thresholds of all rows."""
        for launch in self._after:
            launch()

    def run_row(self, row: int, norms: bool) -> None:
        """Take the step of one row alone, without clipping. A skipped step is not counted.

        Args:
            row: index of the row.
            norms: whether to measure the sums that `Plan.norm_sums` reads.
        """
        launches = self._row_launches.get(row)
        if launches is None:
            launches = self._row_launches[row] = self._make_row_launches(row)
        launches[0]()
        launches[1 + norms]()
        for launch in launches[3:]:
            launch()

    def _make_row_launches(self, row: int) -> list[Launch]:
        """Make the launches of one row: coefficients, update without norms, update with norms, huber threshold."""
        tables = self._tables
        if self._first_chunk is None:
            chunk_row = tables.static.chunk_row
            rows = torch.arange(self._n_rows + 1, device=chunk_row.device)
            self._first_chunk = torch.searchsorted(chunk_row, rows).tolist()
        first, last = self._first_chunk[row : row + 2]
        launches = [self._coefficients_launch(row, row + 1, False, tables.uncounted)]
        launches += [self._update_launch(first, last, norms) for norms in (False, True)]
        if tables.thresholds is not None:
            launches.append(tables.thresholds.launch(row, 1))
        return launches

    def _coefficients_launch(self, first: int, last: int, clip: bool, skipped: Tensor) -> Launch:
        """Launch the coefficients kernel for rows [first, last), which counts a skipped step in `skipped`."""
        tables, totals = self._tables, self._tables.device_totals
        return make_launch(
            kernels.coefficients_kernel, -(-(last - first) // layout.ROWS),
            self._dynamic.words, tables.static.row_group, tables.steps, totals.square_sums, tables.coefficients,
            totals.grad_norm, skipped, self._n_rows, len(totals.square_sums), first, last, CLIP=clip,
        )  # fmt: skip

    def _update_launch(self, first: int, last: int, norms: bool) -> Launch:
        """Launch the update kernel for chunks [first, last)."""
        tables, static = self._tables, self._tables.static
        options = launch_options(current_backend(), self._storage, self._constants["BLOCK"])
        return make_launch(
            kernels.adamw_kernel, last - first,
            static.chunk_row, static.chunk_span, static.addresses, self._dynamic.gradients, tables.coefficients,
            tables.partials, tables.steps, static.rounding, self._n_rows, first,
            **self._constants, NORMS=norms, options=options,
        )  # fmt: skip


def make_launch(
    kernel: Any,
    programs: int,
    *arguments: Tensor | int,
    options: Mapping[str, Any] | None = None,
    **constants: Any,
) -> Launch:
    """Return the launch of a kernel. The arguments are those of `Launch`.

    Args:
        kernel: a `triton.jit` function.
        programs: size of the grid.
        arguments: tensors and ints.
        options: options of Triton's compiler; None: those of every kernel but the update kernel.
        constants: values of the constexpr arguments.
    """
    return Launch(kernel, programs, arguments, constants, options or launch_options(current_backend()))
