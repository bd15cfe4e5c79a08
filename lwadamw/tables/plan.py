"""Plan: the device tables one step is launched from, for all parameters of one device.

Three kinds of table, by how often they change:
    static    which chunk belongs to which parameter, addresses of parameters and state: until a tensor is replaced
    dynamic   gradient addresses and hyperparameters: uploaded when they differ from the last step's, in one copy
    results   coefficients, partial sums, norms: written by the kernels

A plan knows tensors and numbers, no optimizer and no model. Nothing in `run` waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from .. import kernels
from ..kernels import layout
from ..state.decay import THRESHOLD
from ..state.storage import CODES, HALVES, SCALES, Storage
from .launch import Launch
from .request import Header
from .thresholds import Thresholds
from .upload import Upload

# A row of the rounding table for who draws no random bits: see kernels/layout.py.
NO_ROUNDING = (0, 0, 0, 0, 0)

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
_WEIGHTS = {
    "plain": layout.PLAIN,
    "master": layout.MASTER,
    "remainder": layout.REMAINDER,
    "kahan": layout.KAHAN,
    "stochastic": layout.STOCHASTIC,
}


@dataclass(slots=True)
class Row:
    """One parameter of a plan: local, dense tensors of equal memory layout."""

    param: Tensor
    state: Mapping[str, Tensor]  # as named in storage.py
    step: Tensor | float  # steps taken so far
    group: int
    segments: Sequence[int] = field(default_factory=tuple)  # elements of each segment, in memory order; (): one segment
    rounding: Sequence[int] = NO_ROUNDING
    huber_scale: float | None = None  # None: its decay is a multiple of the weight; the same for all rows of a plan


def chunk_length(elements: int) -> int:
    """Elements per chunk for a plan of so many elements: long chunks, unless that leaves the device unfilled.

    Depends on the total alone, so that regrouping parameters cannot change the order of any sum.
    """
    length = elements // (layout.TARGET_CHUNKS * layout.MIN_CHUNK) * layout.MIN_CHUNK
    return int(min(max(length, layout.MIN_CHUNK), layout.MAX_CHUNK))


def update_constants(storage: Storage, strided: bool, amsgrad: bool, huber: bool = False) -> dict[str, Any]:
    """What the update kernel is compiled for, apart from NORMS.

    strided: some parameter is a shard of several runs of elements, and something is rounded at random
    amsgrad: some parameter keeps max_exp_avg_sq
    huber: the decay of all of them is Huber's
    """
    halves = all(dtype in HALVES for dtype in storage[:4]) and storage.weight != "master"
    return {
        "PARAM": _TYPES[storage.param],
        "GRAD": _TYPES[storage.grad],
        "EXP_AVG": _TYPES[storage.exp_avg],
        "EXP_AVG_SQ": _TYPES[storage.exp_avg_sq],
        "WEIGHT": _WEIGHTS[storage.weight],
        "STRIDED": strided,
        "AMSGRAD": amsgrad,
        "HUBER": huber,
        "BLOCK": 2 * layout.BLOCK if halves and not amsgrad else layout.BLOCK,
    }


def launch_options(
    backend: str, storage: Storage | None = None, block: int = 0, strided: bool = False
) -> dict[str, Any]:
    """Compiler options, by backend, "cuda" or "hip"; of the update kernel with what it is compiled for."""
    options: dict[str, Any] = {"num_warps": layout.WARPS[backend], "enable_fp_fusion": False}
    if backend == "cuda" and block > layout.BLOCK:
        options["maxnreg"] = layout.DOUBLE_REGISTERS
    elif backend == "cuda" and storage is not None and storage.draws and not strided:
        options["maxnreg"] = layout.RANDOM_REGISTERS
    return options


def total_bits(n_chunks: int) -> int:
    """Bits below the point for the integer sum over chunks: their sum still fits into an int64."""
    return min(63 - max(n_chunks, 1).bit_length(), 52)


def _backend() -> str:
    return "hip" if torch.version.hip else "cuda"


class Shared:
    """What the plans of one device share: the sums of squares that make up the global norm, and the skipped steps."""

    def __init__(self, device: torch.device, n_totals: int, skipped: Tensor) -> None:
        self.totals = torch.zeros(n_totals, dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self.skipped = skipped  # int64[]


class Plan:
    """Parameters of one device and one storage.

    Args:
        slot: which of the shared totals is this plan's
        counts: whether this plan is the one of all that counts skipped steps
    """

    def __init__(
        self,
        device: torch.device,
        storage: Storage,
        rows: Sequence[Row],
        n_groups: int,
        shared: Shared,
        slot: int = 0,
        counts: bool = True,
    ) -> None:
        self.device = device
        self.storage = storage
        self.n_rows = len(rows)
        self.huber = any(row.huber_scale is not None for row in rows)
        self.amsgrad = any("max_exp_avg_sq" in row.state for row in rows)
        self.shared, self.total = shared, shared.totals[slot : slot + 1]
        self._skipped = shared.skipped if counts else torch.zeros_like(shared.skipped)

        length = chunk_length(sum(row.param.numel() for row in rows))
        chunk_row: list[NDArray[np.int32]] = []
        chunk_span: list[NDArray[np.int64]] = []
        segment_chunk, n_chunks = [0], 0
        for i, row in enumerate(rows):
            first = 0
            for count in row.segments or (row.param.numel(),):
                starts = np.arange(first, first + count, length, dtype=np.int64)
                chunk_row.append(np.full(len(starts), i, np.int32))
                chunk_span.append(starts << layout.COUNT_BITS | np.minimum(first + count - starts, length))
                n_chunks += len(starts)
                segment_chunk.append(n_chunks)
                first += count
        self.n_chunks, self.n_segments = n_chunks, len(segment_chunk) - 1

        arrays = self._arrays()
        addresses = np.zeros((1 + len(arrays) + self.huber, len(rows)), np.int64)
        for i, row in enumerate(rows):
            tensors = (row.param, *(row.state.get(key) for key in arrays))
            addresses[: len(tensors), i] = [0 if t is None else t.data_ptr() for t in tensors]

        self._chunk_row = self._table(np.concatenate(chunk_row))
        self._chunk_span = self._table(np.concatenate(chunk_span))
        self._segment_chunk = self._table(np.array(segment_chunk, np.int32))
        self._addresses = self._table(addresses)
        self._row_group = self._table(np.array([row.group for row in rows], np.int32))
        self._row_launches: dict[int, list[Launch]] = {}
        self._first_chunk: list[int] | None = None  # of each row, and n_chunks, once a row steps alone
        rounding = np.array([row.rounding for row in rows] if storage.draws else [], np.int64).reshape(
            -1, layout.ROUNDING
        )
        self._strided = bool((rounding[:, 3] != rounding[:, 4]).any())
        self._rounding = self._table(np.ascontiguousarray(rounding.T))
        self._upload = Upload(layout.HEADER + len(rows) + n_groups * layout.GROUP, device)
        self._gradient_table = self._upload.table[layout.HEADER :]
        self._gradients: list[int] = []
        self._header = Header()
        self._sent = False

        self.steps = self._gather_steps(rows)
        self._coefficients = torch.zeros(len(rows), layout.COEFFICIENTS, dtype=torch.float32, device=device)
        # NaN until a parameter takes its first step: nobody has read its weight yet.
        self._partials = torch.full((n_chunks, layout.STATISTICS), float("nan"), dtype=torch.float32, device=device)
        self._thresholds: Thresholds | None = None
        if self.huber:
            factors = [(row.huber_scale or 0.0) / max(row.param.numel(), 1) for row in rows]
            self._thresholds = Thresholds(
                factors, self._addresses[-2], self._coefficients, self._chunk_row, launch_options(_backend())
            )
            self._addresses[-1] = self._thresholds.absolutes.data_ptr()
        self._prepare_launches()

    def _arrays(self) -> list[str]:
        """Keys of the state tensors the update kernel takes, in its order."""
        keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        if self.storage.companion is not None:
            keys.append("kahan_comp" if self.storage.weight == "kahan" else "master_param")
        keys += [scales for key, scales in SCALES.items() if getattr(self.storage, key) in CODES]
        return keys + [THRESHOLD] * self.huber

    def _launch(
        self,
        kernel: Any,
        programs: int,
        *arguments: Tensor | int,
        options: Mapping[str, Any] | None = None,
        **constants: Any,
    ) -> Launch:
        return Launch(kernel, programs, arguments, constants, options or launch_options(_backend()))

    def _prepare_launches(self) -> None:
        chunks = (self._chunk_row, self._chunk_span)
        self._launch_squares = self._launch(
            kernels.grad_norm_kernel, self.n_chunks, *chunks, self._gradient_table, self._partials,
            GRAD=_TYPES[self.storage.grad],
        )  # fmt: skip
        self._launch_total = self._launch(
            kernels.total_kernel, 1, self._partials, self.total, self.n_chunks, BITS=total_bits(self.n_chunks)
        )
        self._launch_coefficients = [self._coefficients_launch(0, self.n_rows, clip) for clip in (False, True)]
        self._launch_update = [self._update_launch(0, self.n_chunks, norms) for norms in (False, True)]
        self._launch_after = () if self._thresholds is None else (self._thresholds.launch(0, self.n_rows),)

    def _coefficients_launch(self, first: int, last: int, clip: bool) -> Launch:
        shared = self.shared
        return self._launch(
            kernels.coefficients_kernel, -(-(last - first) // layout.ROWS),
            self._upload.table, self._row_group, self.steps, shared.totals, self._coefficients, shared.grad_norm,
            self._skipped, self.n_rows, len(shared.totals), first, last, CLIP=clip,
        )  # fmt: skip

    def _update_launch(self, first: int, last: int, norms: bool) -> Launch:
        constants = update_constants(self.storage, self._strided, self.amsgrad, self.huber)
        return self._launch(
            kernels.adamw_kernel, last - first,
            self._chunk_row, self._chunk_span, self._addresses, self._gradient_table, self._coefficients,
            self._partials, self.steps, self._rounding, self.n_rows, first,
            **constants, NORMS=norms,
            options=launch_options(_backend(), self.storage, constants["BLOCK"], self._strided),
        )  # fmt: skip

    def _table(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _gather_steps(self, rows: Sequence[Row]) -> Tensor:
        steps = torch.tensor(
            [float(r.step) if not isinstance(r.step, Tensor) or r.step.device.type == "cpu" else 0.0 for r in rows],
            dtype=torch.float32,
            device=self.device,
        )
        for i, row in enumerate(rows):
            if isinstance(row.step, Tensor) and row.step.device.type != "cpu":
                steps[i].copy_(row.step)
        return steps

    def on_device(self) -> AbstractContextManager[object]:
        if self.device.type == "cpu" or self.device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(self.device)

    def set_groups(self, rows: NDArray[np.int64]) -> None:
        """Replace the hyperparameters of every group; int64[n_groups, GROUP], sent with the next `stage`."""
        self._upload.words[layout.HEADER + self.n_rows :] = rows.reshape(-1)
        self._sent = False

    def stage(self, gradients: list[int], header: Header) -> None:
        """Tell the device what this step works on: the gradient address of each row (0: none) and the header."""
        if self._sent and gradients == self._gradients and header == self._header:
            return
        upload = self._upload
        upload.words[layout.HEADER : layout.HEADER + self.n_rows] = gradients
        self._write_header(header)
        upload.send()
        self._gradients, self._sent = gradients, True

    def _write_header(self, header: Header) -> None:
        self._upload.floats[0] = header.max_grad_norm
        self._upload.words[1:4] = header.grad_scale, header.found_inf, header.regardless
        self._header = header

    def sum_gradients(self) -> None:
        """Write the sum of squares of this plan's gradients to `total`."""
        self._launch_squares()
        self._launch_total()

    def run(self, *, clip: bool, norms: bool) -> None:
        """Take the step: every chunk of every parameter of every group, in two launches; a third for huber thresholds."""
        self._launch_coefficients[clip]()
        self._launch_update[norms]()
        for launch in self._launch_after:
            launch()

    def run_row(self, row: int, gradient: int, norms: bool) -> None:
        """Take the step of one parameter alone, from the same tables, without clipping or loss scale."""
        upload, place = self._upload, layout.HEADER + row
        upload.words[place] = gradient
        if self._sent and self._header == Header():
            upload.send(place, place + 1)
        else:
            self._write_header(Header())
            upload.send()
        self._gradients, self._sent = [], True
        launches = self._row_launches.get(row)
        if launches is None:
            if self._first_chunk is None:
                self._first_chunk = torch.searchsorted(
                    self._chunk_row, torch.arange(self.n_rows + 1, device=self.device)
                ).tolist()
            first, last = self._first_chunk[row : row + 2]
            launches = [self._coefficients_launch(row, row + 1, False)]
            launches += [self._update_launch(first, last, measured) for measured in (False, True)]
            launches += [] if self._thresholds is None else [self._thresholds.launch(row, 1)]
            self._row_launches[row] = launches
        launches[0]()
        launches[1 + norms]()
        for launch in launches[3:]:
            launch()

    def norm_sums(self) -> Tensor:
        """float64[n_segments, 4]: sums of squares of weight, update, gradient, and <weight before, update>."""
        sums = torch.empty(self.n_segments, layout.STATISTICS, dtype=torch.float64, device=self.device)
        arguments = (self._partials, self._segment_chunk, self._chunk_row, self._coefficients, sums)
        with self.on_device():
            self._launch(kernels.norms_kernel, self.n_segments, *arguments)()
        return sums
