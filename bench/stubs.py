"""Contexts in which an optimizer runs all of its Python code and launches nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock


class _Stub:
    """Replaces a kernel. It also replaces the result of a launch."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: object) -> Callable[..., _Stub]:
        return lambda *args, **kwargs: self


def stubbed_kernels(package: str = "lwadamw") -> Any:
    """A context in which the plans of a package are made with kernels that do nothing.

    Args:
        package: import name of the package, for example "lwadamw".
    """
    kernels = importlib.import_module(f"{package}.kernels")
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    return mock.patch.multiple(kernels, **{name: _Stub(getattr(kernels, name)) for name in names})


def nothing(*args: object, **kwargs: object) -> None:
    """Replaces an operator of torch."""


def stubbed_fused(steps_too: bool) -> AbstractContextManager[object]:
    """A context in which torch fused runs its Python code and launches nothing.

    Args:
        steps_too: also stub the operator that advances the step counters.
    """
    stack = ExitStack()
    stack.enter_context(mock.patch("torch._fused_adamw_", nothing))
    if steps_too:
        stack.enter_context(mock.patch("torch._foreach_add_", nothing))
    return stack
