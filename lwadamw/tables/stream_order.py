"""Stream order: steps on different streams of one device use the same hidden tables one after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..state.checks import capturing


class StreamOrder:
    """The stream that last used the tables of one device, and the tables.

    Whoever uses his own tensors on two streams has to order the streams himself. He does not know our tables. So if a step is
    on another stream than the step before, its stream waits here for all that the former stream has been given. The
    former stream has to exist until then. A capture is never ordered: its graph has an upload of its own.

    Args:
        device: the device. On a CPU there is nothing to order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[Tensor] = []
        self._last = None if device.type == "cpu" else torch.cuda.current_stream(device)
        self._streams = {self._last}  # all streams that have used the tables so far

    def add(self, tables: Iterable[Tensor]) -> None:
        """Add tables that have been allocated on the current stream.

        Args:
            tables: tensors on the device.
        """
        self._tables += tables

    def follow(self) -> None:
        """Let the current stream wait for the last use of the tables. If it is the stream of the last use, do nothing."""
        if self._last is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream == self._last or capturing(self._device):
            return
        stream.wait_stream(self._last)
        if stream not in self._streams:
            # Otherwise the memory of a dropped table could be used again while this stream still reads it.
            for table in self._tables:
                table.record_stream(stream)
            self._streams.add(stream)
        self._last = stream
