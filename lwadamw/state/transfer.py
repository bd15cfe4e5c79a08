"""Transfer: a tensor on another device, for calculations that go on there at once."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, the tensor itself if it is there. The host waits only for a copy to the CPU.

    With `non_blocking=True`, torch would return a tensor on the CPU into which a GPU has not copied yet. The CPU would then
    calculate with whatever was in this memory before.

    Args:
        tensor: the tensor.
        device: where the result is.
        dtype: dtype of the result; None: that of the tensor.
    """
    return tensor.to(device, tensor.dtype if dtype is None else dtype, non_blocking=device.type != "cpu")
