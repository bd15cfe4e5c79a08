"""Step hooks: torch's wrapper around `step()`, left out in a step that nobody watches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.optim.optimizer as torch_optimizer
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

# Tells low-level observers about a range, and costs nothing where there are none. torch 2.6 and later have it.
_Range: Any = torch._C._profiler._RecordFunctionFast
_INSIDE: Final = "_inside_watched_step"  # attribute of an optimizer: whether a step that runs hooks is under way


def watched_only(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `step()` as torch does, so that step hooks run and profilers see a range.

    torch's wrapper enters its range in every step, which costs as much as looking up 100 tensors. So it is used only if a hook
    is registered or a profiler runs.

    The `step` of a subclass may call the one of its parent. torch wraps both, and would run all hooks twice: a monitor would
    count two steps. Here the inner one runs no hooks.

    Args:
        step: the method `step` of an optimizer class.
    """
    watched: Callable[..., Any] = Optimizer.profile_hook_step(step)

    @_disable_dynamo
    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )
        if (hooks or torch._C._autograd._profiler_enabled()) and not self.__dict__.get(_INSIDE):
            self.__dict__[_INSIDE] = True
            try:
                return watched(self, *args, **kwargs)
            finally:
                self.__dict__[_INSIDE] = False
        with _Range(f"Optimizer.step#{type(self).__name__}.step"):
            return step(self, *args, **kwargs)

    return wrapper
