"""Plan: the device tables one step is launched from, for all parameters of one device.

Three kinds of table, by how often they change:
    static    which chunk belongs to which parameter, addresses of parameters and state: until a tensor is replaced
    dynamic   gradient addresses and hyperparameters: uploaded when they differ from the last step's, in one copy
    results   coefficients, partial sums, norms: written by the kernels

A plan knows tensors and numbers, no optimizer and no model. Nothing in `run` waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from . import kernels
from .backends import capturing
from .kernels import layout
from .launch import Launch


@dataclass(slots=True)
class Row:
    """One parameter of a plan: local, dense tensors of equal memory layout."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor | float  # steps taken so far
    group: int
    segments: Sequence[int] = field(default_factory=tuple)  # elements of each segment, in memory order; (): one segment


class Upload:
    """A device table of int64 words and its master copy on the host.

    On a GPU each upload goes through a pinned buffer of its own, reused only after the copy out of it has run: the
    host may be many steps ahead of the device.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self.on_host = device.type == "cpu"
        self.table = torch.zeros(words, dtype=torch.int64, device=device)
        self.words: NDArray[np.int64] = self.table.numpy() if self.on_host else np.zeros(words, np.int64)
        self.floats: NDArray[np.float64] = self.words.view(np.float64)
        self._buffers: list[tuple[Tensor, NDArray[np.int64], torch.cuda.Event]] = []

    def send(self) -> None:
        """Make the device see `words` from the next launch on."""
        if capturing():
            raise RuntimeError(
                "lwadamw.AdamW: gradients or hyperparameters changed since the last step, so this step cannot be captured "
                "in a CUDA graph. Take one uncaptured step on the same gradients first, keep them in place with "
                "zero_grad(set_to_none=False), and use tensors for hyperparameters that change between replays."
            )
        if self.on_host:
            return
        pinned, view, event = self._free_buffer()
        view[:] = self.words
        self.table.copy_(pinned, non_blocking=True)
        event.record()

    def _free_buffer(self) -> tuple[Tensor, NDArray[np.int64], torch.cuda.Event]:
        for buffer in self._buffers:
            if buffer[2].query():  # type: ignore[no-untyped-call]
                return buffer
        pinned = torch.empty(len(self.words), dtype=torch.int64, pin_memory=True)
        buffer = (pinned, pinned.numpy(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self._buffers.append(buffer)
        return buffer


def chunk_length(elements: int) -> int:
    """Elements per chunk for a plan of so many elements: long chunks, unless that leaves the device unfilled.

    Depends on the total alone, so that regrouping parameters cannot change the order of any sum.
    """
    length = elements // (layout.TARGET_CHUNKS * layout.MIN_CHUNK) * layout.MIN_CHUNK
    return int(min(max(length, layout.MIN_CHUNK), layout.MAX_CHUNK))


def total_bits(n_chunks: int) -> int:
    """Bits below the point for the integer sum over chunks: their sum still fits into an int64."""
    return min(63 - max(n_chunks, 1).bit_length(), 52)


class Plan:
    def __init__(self, device: torch.device, rows: Sequence[Row], n_groups: int) -> None:
        self.device = device
        self.n_rows = len(rows)
        self.amsgrad = any(row.max_exp_avg_sq is not None for row in rows)

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

        addresses = np.zeros((4 if self.amsgrad else 3, len(rows)), np.int64)
        for i, row in enumerate(rows):
            tensors = (row.param, row.exp_avg, row.exp_avg_sq, row.max_exp_avg_sq)[: len(addresses)]
            addresses[:, i] = [0 if t is None else t.data_ptr() for t in tensors]

        self._chunk_row = self._table(np.concatenate(chunk_row))
        self._chunk_span = self._table(np.concatenate(chunk_span))
        self._segment_chunk = self._table(np.array(segment_chunk, np.int32))
        self._addresses = self._table(addresses)
        self._row_group = self._table(np.array([row.group for row in rows], np.int32))
        self._upload = Upload(layout.HEADER + len(rows) + n_groups * layout.GROUP, device)
        self._gradient_table = self._upload.table[layout.HEADER :]
        self._gradients: list[int] = []
        self._header: tuple[float, int, int] = (0.0, 0, 0)

        self.steps = self._gather_steps(rows)
        self.total = torch.zeros(1, dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=device)
        self._coefficients = torch.zeros(len(rows), layout.COEFFICIENTS, dtype=torch.float32, device=device)
        # NaN until a parameter takes its first step: nobody has read its weight yet.
        self._partials = torch.full((n_chunks, layout.STATISTICS), float("nan"), dtype=torch.float32, device=device)
        self._prepare_launches()

    def _prepare_launches(self) -> None:
        def launch(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> Launch:
            return Launch(kernel, programs, arguments, constants, _options())

        chunks = (self._chunk_row, self._chunk_span)
        self._launch_squares = launch(
            kernels.grad_norm_kernel, self.n_chunks, *chunks, self._gradient_table, self._partials, GRAD=tl.float32
        )
        self._launch_total = launch(
            kernels.total_kernel, 1, self._partials, self.total, self.n_chunks, BITS=total_bits(self.n_chunks)
        )
        self._launch_coefficients = [
            launch(
                kernels.coefficients_kernel, -(-self.n_rows // layout.ROWS),
                self._upload.table, self._row_group, self.steps, self.total, self._coefficients, self.grad_norm,
                self.n_rows, CLIP=clip,
            )
            for clip in (False, True)
        ]  # fmt: skip
        self._launch_update = [
            launch(
                kernels.adamw_kernel, self.n_chunks,
                *chunks, self._addresses, self._gradient_table, self._coefficients, self._partials, self.n_rows,
                PARAM=tl.float32, GRAD=tl.float32, STATE=tl.float32, AMSGRAD=self.amsgrad, NORMS=norms,
            )
            for norms in (False, True)
        ]  # fmt: skip

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
        self._gradients = []

    def stage(self, gradients: list[int], max_grad_norm: float, grad_scale: int, found_inf: int) -> None:
        """Tell the device what this step works on: the gradient address of each row (0: none) and the header."""
        header = (max_grad_norm, grad_scale, found_inf)
        if gradients == self._gradients and header == self._header:
            return
        upload = self._upload
        upload.words[layout.HEADER : layout.HEADER + self.n_rows] = gradients
        upload.floats[0] = max_grad_norm
        upload.words[1:3] = grad_scale, found_inf
        upload.send()
        self._gradients, self._header = gradients, header

    def sum_gradients(self) -> None:
        """Write the sum of squares of this plan's gradients to `total`."""
        self._launch_squares()
        self._launch_total()

    def run(self, *, clip: bool, norms: bool) -> None:
        """Take the step: every chunk of every parameter of every group, in two launches."""
        self._launch_coefficients[clip]()
        self._launch_update[norms]()

    def norm_sums(self) -> Tensor:
        """float64[n_segments, 4]: sums of squares of weight, update, gradient, and <weight before, update>."""
        sums = torch.empty(self.n_segments, layout.STATISTICS, dtype=torch.float64, device=self.device)
        with self.on_device():
            kernels.norms_kernel[(self.n_segments,)](
                self._partials, self._segment_chunk, self._chunk_row, self._coefficients, sums, **_options()
            )
        return sums


def _options() -> dict[str, Any]:
    return {"num_warps": layout.WARPS["hip" if torch.version.hip else "cuda"], "enable_fp_fusion": False}
