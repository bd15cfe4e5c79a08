"""Gradient release: each parameter takes its step inside backward, as soon as its gradient is complete, and drops it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


class GradientRelease:
    """Hooks on parameters; `remove()`, or leaving it as a context, takes them away."""

    def __init__(self, params: Iterable[Tensor], step: Callable[[Tensor], None], on_remove: Callable[[], None]) -> None:
        self._step, self._on_remove = step, on_remove
        self._handles: list[Any] = []
        self.add(params)

    def _hook(self, p: Tensor) -> None:
        self._step(p)
        p.grad = None

    def add(self, params: Iterable[Tensor]) -> None:
        for p in params:
            if p.requires_grad:
                self._handles.append(p.register_post_accumulate_grad_hook(self._hook))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._on_remove()

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
