"""Gradient release: a parameter takes its step inside backward, when its gradient is complete, and drops the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..state import keys


class GradientRelease:
    """Handle of `AdamW.release_gradients()`: it owns one hook on each parameter.

    `remove()` takes the hooks away. The handle is also a context manager that calls `remove()` at its end.

    Args:
        params: parameters to put hooks on. A parameter that does not require a gradient gets no hook.
        step: takes the step of one parameter whose gradient is complete.
        on_remove: called once the hooks are gone.
    """

    def __init__(self, params: Iterable[Tensor], step: Callable[[Tensor], None], on_remove: Callable[[], None]) -> None:
        self._step, self._on_remove = step, on_remove
        self._handles: list[Any] = []
        self.add(params)

    def _hook(self, p: Tensor) -> None:
        self._step(p)
        p.grad = None

    def add(self, params: Iterable[Tensor]) -> None:
        """Put hooks on more parameters.

        Args:
            params: parameters to put hooks on. A parameter that does not require a gradient gets no hook.
        """
        for p in params:
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(self._hook))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Take all hooks away. From then on `AdamW.step()` takes the steps again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._on_remove()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def check_releasable(groups: Sequence[Mapping[str, Any]], max_grad_norm: float | None) -> None:
    """Check that every parameter can take its step before the other gradients are complete.

    Args:
        groups: the optimizer's parameter groups.
        max_grad_norm: the optimizer's clipping norm, or None.

    Raises:
        RuntimeError: `max_grad_norm` is set, or a group keeps its gradients in another attribute than `grad`.
    """
    if max_grad_norm is not None:
        raise RuntimeError(
            f"release_gradients() with max_grad_norm={max_grad_norm}: the global norm is known only when all "
            "gradients are. Set optimizer.max_grad_norm = None."
        )
    for i, group in enumerate(groups):
        attribute = keys.GRAD_ATTRIBUTE.of(group)
        if attribute != keys.GRAD_ATTRIBUTE.default:
            raise RuntimeError(
                f"release_gradients(): group {i} has grad_attribute={attribute!r}, which autograd does not write. "
                "Build the optimizer without grad_attribute, or do not call release_gradients()."
            )
