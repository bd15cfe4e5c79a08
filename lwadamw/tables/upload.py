"""Upload: a device table that the host rewrites between two steps without waiting for the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..state.checks import capturing


class Upload:
    """A device table of int64 words, and the same words on the host, where they are written.

    For a GPU, every upload copies the words into a pinned buffer first, and from there to the device. The host may be many
    steps ahead of the device. So a buffer is used again only after the device has copied out of it.

    `table` is int64[words] on the device. `words` and `floats` are the host's int64[words] and float64[words], two views of
    the same memory. On the CPU they are views of `table` too.

    Args:
        words: number of words.
        device: where the kernels read the table.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self.on_host = device.type == "cpu"
        self.table = torch.zeros(words, dtype=torch.int64, device=device)
        self.words: NDArray[np.int64] = self.table.numpy() if self.on_host else np.zeros(words, np.int64)
        self.floats: NDArray[np.float64] = self.words.view(np.float64)
        self._buffers: list[tuple[Tensor, NDArray[np.int64], torch.cuda.Event]] = []

    def send(self, first: int = 0, last: int | None = None) -> None:
        """Make the device see words [first, last) as the host has them now, from the next launch on.

        Args:
            first: index of the first word.
            last: index after the last word; None: the end of the table.

        Raises:
            RuntimeError: a CUDA graph is being captured. Its replays would read addresses that no longer hold.
        """
        if capturing():
            raise RuntimeError(
                "lwadamw.AdamW: gradients or hyperparameters changed since the last step, so this step cannot be captured "
                "in a CUDA graph. Take one uncaptured step on the same gradients first, keep them in place with "
                "zero_grad(set_to_none=False), and use tensors for hyperparameters that change between replays."
            )
        if self.on_host:
            return
        pinned, view, event = self._free_buffer()
        view[first:last] = self.words[first:last]
        self.table[first:last].copy_(pinned[first:last], non_blocking=True)
        event.record()

    def _free_buffer(self) -> tuple[Tensor, NDArray[np.int64], torch.cuda.Event]:
        """Return a pinned buffer out of which the device has copied, its NumPy view, and the event of the last copy."""
        for buffer in self._buffers:
            if buffer[2].query():  # type: ignore[no-untyped-call]
                return buffer
        pinned = torch.empty(len(self.words), dtype=torch.int64, pin_memory=True)
        buffer = (pinned, pinned.numpy(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self._buffers.append(buffer)
        return buffer
