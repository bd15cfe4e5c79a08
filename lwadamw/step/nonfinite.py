"""Watch: raises on the host for a norm that was not finite on the device, without waiting for it."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor


class Watch:
    """Norms on their way to the host."""

    def __init__(self) -> None:
        self._coming: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def look(self, norm: Tensor) -> None:
        """Send for a norm, float32[]. On the CPU it is there already.

        Raises:
            RuntimeError: it is not finite.
        """
        if norm.device.type == "cpu":
            _check(float(norm))
            return
        pinned = torch.empty((), dtype=norm.dtype, pin_memory=True)
        pinned.copy_(norm, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._coming.append((pinned, event))

    def check(self) -> None:
        """Look at the norms that have arrived.

        Raises:
            RuntimeError: one of them is not finite.
        """
        while self._coming and self._coming[0][1].query():  # type: ignore[no-untyped-call]
            _check(float(self._coming.popleft()[0]))


def _check(norm: float) -> None:
    if not math.isfinite(norm):
        raise RuntimeError(
            f"nonfinite='raise': the global gradient norm of a step was {norm}. That step changed nothing. Look for the "
            "parameter in norms() of the step before, or let such steps pass by with nonfinite='skip'."
        )
