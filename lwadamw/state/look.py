"""Look: what an address does not tell about a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .members import local


def look(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, strides, dtype, device and layout of what this process holds of a tensor.

    Somebody may shrink a tensor, or give it another dtype, and leave it at its address. The look shows it.

    Args:
        tensor: a tensor of any layout.
    """
    held = local(tensor)
    strides = held.stride() if held.layout == torch.strided else ()
    return held.shape, strides, held.dtype, held.device, held.layout
