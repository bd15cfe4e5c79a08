"""Nested backward: a backward that runs inside another backward, as reentrant checkpointing starts one for each segment."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction

# Every backward that Python starts passes through the first function. The engine calls the backward of a custom
# autograd function through the second one.
_RUN = graph._engine_run_backward.__code__
_APPLY = BackwardCFunction.apply.__code__


def in_nested_backward() -> bool:
    """Return whether the caller runs in a backward that was started inside another backward.

    Within one backward, autograd accumulates the gradient of a parameter once. A nested backward accumulates what its own
    part of the graph contributes, so a parameter may get several gradients before the outer backward ends.

    Backward of a GPU runs in a thread of its own, whose frames do not include the call of the outer backward. There a nested
    backward is seen if a custom autograd function has started it, and not if a hook has.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(1)
    running = False
    while frame is not None:
        if running and frame.f_code in (_RUN, _APPLY):
            return True
        running = running or frame.f_code is _RUN
        frame = frame.f_back
    return False
