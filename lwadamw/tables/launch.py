"""Launch: a kernel together with arguments that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# From Triton 3.3 on, the caller of a compiled kernel passes the values of its constexpr arguments too.
TAKES_CONSTANTS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 3)


class Launch:
    """Call `kernel[(programs,)](*arguments, **constants, **options)`, many times with the same arguments.

    At every launch, Triton looks at the type and the alignment of every argument to find the compiled kernel that fits.
    For tables that stay where they are, Triton finds the same compiled kernel every time. So this object keeps the
    compiled kernel after the first call. Later calls pass bare addresses to it and skip Triton's preparation.

    Args:
        kernel: a `triton.jit` function. Its constexpr arguments have to be its last ones.
        programs: size of the grid.
        arguments: tensors and ints. This object keeps them alive.
        constants: values of the constexpr arguments, by name.
        options: options of Triton's compiler, by name.
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

    @property
    def kernel_name(self) -> str:
        """Name of the `triton.jit` function."""
        name: str = self._kernel.fn.__name__
        return name

    def __call__(self) -> None:
        """Launch on the current stream. The current device has to be the one of the arguments. An empty grid does nothing."""
        if self._direct is not None:
            self._direct(*self._values)
            return
        if not self._grid[0]:
            return
        compiled = self._kernel[self._grid](*self._arguments, **self._constants, **self._options)
        if compiled is None:
            return  # Triton's interpreter compiles nothing
        self._values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self._arguments]
        if TAKES_CONSTANTS:
            names = self._kernel.arg_names[len(self._arguments) :]
            self._values += [self._constants[name] for name in names]
        self._direct = compiled[self._grid]
