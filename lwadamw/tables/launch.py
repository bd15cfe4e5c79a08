"""Launch: a kernel bound to arguments that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# Before 3.3 a compiled kernel was called without the values of its constexpr arguments.
_TAKES_CONSTANTS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 3)


class Launch:
    """Calls `kernel[(programs,)](*arguments, **constants, **options)`, from the second time on without its preparation.

    Triton looks at type and alignment of every argument at every launch, to find the compiled kernel that fits. For
    tables that stay where they are it always finds the same one, so that one is kept and called with bare addresses.

    Args:
        kernel: a `triton.jit` function whose constexpr arguments come last
        programs: size of the grid
        arguments: tensors and ints, kept alive by this object
        constants: the constexpr arguments by name
        options: compiler options
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        arguments: Sequence[Tensor | int],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._kernel, self._grid, self._arguments = kernel, (programs, 1, 1), arguments
        self._constants, self._options = constants, options
        self._values: list[Any] = []
        self._direct: Callable[..., object] | None = None

    def __call__(self) -> None:
        """Launch on the current stream of the current device, which has to be that of the arguments; nothing if empty."""
        if self._direct is not None:
            self._direct(*self._values)
            return
        if not self._grid[0]:
            return
        compiled = self._kernel[self._grid](*self._arguments, **self._constants, **self._options)
        if compiled is None:
            return  # the interpreter compiles nothing
        self._values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self._arguments]
        if _TAKES_CONSTANTS:
            names = self._kernel.arg_names[len(self._arguments) :]
            self._values += [self._constants[name] for name in names]
        self._direct = compiled[self._grid]
