"""nonfinite="raise": raise an error on the host for a bad gradient norm on the device, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor


class DelayedNormCheck:
    """Checks global gradient norms on the host as soon as they have arrived there.

    On a GPU, `submit` starts an asynchronous copy of the norm to the host. A later call of `raise_if_arrived` checks it.
    """

    def __init__(self) -> None:
        # Norms on their way to the host, oldest first. The event says when the copy has finished.
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def submit(self, norm: Tensor) -> None:
        """Check a norm on the CPU now, or start the copy of a norm on a GPU.

        Args:
            norm: global gradient norm of the last step, float32[].

        Raises:
            RuntimeError: the norm is on the CPU and is not finite.
        """
        if norm.device.type == "cpu":
            _check(float(norm))
            return
        # An event belongs to the device and the stream on which it is recorded. It has to be the stream of the copy.
        with torch.cuda.device(norm.device):
            pinned = torch.empty((), dtype=norm.dtype, device="cpu", pin_memory=True)
            pinned.copy_(norm, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(norm.device))
        self._copies.append((pinned, event))

    def raise_if_arrived(self) -> None:
        """Check the norms whose copies have finished. Do not wait for the others.

        Raises:
            RuntimeError: one of these norms is not finite.
        """
        while self._copies and self._copies[0][1].query():  # type: ignore[no-untyped-call]
            _check(float(self._copies.popleft()[0]))


def _check(norm: float) -> None:
    if not math.isfinite(norm):
        raise RuntimeError(
            f"nonfinite='raise': the global gradient norm of a step was {norm}. That step changed nothing. To find the "
            "parameter, read norms() after the step before. To skip steps like this one, use nonfinite='skip'."
        )
