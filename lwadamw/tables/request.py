"""What a step is asked for: by its caller in tensors, and as the device reads it in addresses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """What a step is to do besides the update."""

    max_grad_norm: float | None = None
    nonfinite: str = "skip"  # what becomes of a step whose norm to clip by is not finite: "skip", "raise" or "pass"
    norms: bool = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Header(NamedTuple):
    """What a step has besides gradients and hyperparameters."""

    max_grad_norm: float = 0.0
    grad_scale: int = 0  # address of the loss scale, or 0
    found_inf: int = 0  # address of a float that is not 0 if this step must not happen, or 0
    regardless: int = 0  # 1: it happens even if the norm to clip by is not finite
