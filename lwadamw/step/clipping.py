"""The factor by which the torch backend unscales and clips gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..state.transfer import moved
from ..tables.request import Request


def clip_factor(totals: Sequence[Tensor], request: Request) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what the torch backend needs for clipping, computed on the device of the last total.

    Args:
        totals: sums of squares of all gradients before unscaling, one element each. Their sum is the squared global norm.
        request: the clipping norm and the loss scale of this step.

    Returns:
        The global norm after unscaling, float32[]; the factor that unscales and clips the gradients, float64[]; and a
        float32[] that is not zero if the step must change nothing (None: the step always happens).
    """
    device = totals[-1].device
    squares = torch.stack([moved(t, device).reshape(()) for t in totals]).sum()
    grad_scale, found_inf = request.grad_scale, request.found_inf
    scale = torch.ones_like(squares) if grad_scale is None else moved(grad_scale, device, torch.float64)
    norm = squares.sqrt() / scale
    factor = ((request.max_grad_norm or 0.0) / (norm + 1e-6)).clamp(max=1.0) / scale
    stop = None if request.nonfinite == "pass" else norm.isfinite().logical_not().float()
    if found_inf is not None:
        found = moved(found_inf, device, torch.float32).reshape(())
        stop = found if stop is None else torch.maximum(stop, found)
    # Conversion to float32 would make a large norm inf, and only a step that did not happen has this norm.
    shown = torch.where(norm.isfinite(), norm.clamp(max=torch.finfo(torch.float32).max), norm)
    return shown.float(), factor, stop
