"""Request and header: what a step does besides the plain update, as the caller says it and as the device reads it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """What the caller asks of one step.

    Args:
        max_grad_norm: clip the gradients to this global norm; None: do not clip.
        nonfinite: what happens to a clipped step whose global norm is not finite. "skip": the step does not happen.
            "raise": the step does not happen, and this step or a later one raises a RuntimeError. "pass": the step happens.
        norms: whether the step measures norms.
        grad_scale: float[], the loss scale by which the gradients have been multiplied; None: 1.
        found_inf: float[], not 0 if the step must not happen; None: the step happens.
    """

    max_grad_norm: float | None = None
    nonfinite: str = "skip"
    norms: bool = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Header(NamedTuple):
    """The same for the kernels: the first words of the dynamic table, see HEADER in kernels/layout.py.

    Args:
        max_grad_norm: clip the gradients to this global norm. Only the launch for clipped steps reads it.
        grad_scale: address of the loss scale, a float32; 0: there is none.
        found_inf: address of a float32 that is not 0 if the step must not happen; 0: there is none.
        regardless: 1: a clipped step happens even if the global norm is not finite; 0: such a step does not happen.
    """

    max_grad_norm: float = 0.0
    grad_scale: int = 0
    found_inf: int = 0
    regardless: int = 0
