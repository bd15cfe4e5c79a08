"""Launches of the package on the pretended GPU: Triton compiles them for sm_90, and machine.py executes the PTX.

Tensors stay on the CPU. Kernels see their memory and nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lwadamw.step import backends
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.program import Program, parse

_run = JITFunction.run
TARGET = GPUTarget("cuda", 90, 32)


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return 9, 0


def memory_of_tensors() -> Iterator[tuple[int, int]]:
    """(address, bytes) of all CPU tensors that exist, gradients included."""
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
                continue
            try:
                yield tensor.data_ptr(), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
            except RuntimeError:
                pass  # a fake tensor has no memory


def compile_for(kernel: JITFunction[Any], arguments: Sequence[Any], n_programs: int, **options: Any) -> Any:
    """Compile a kernel as Triton does when it is launched with these arguments.

    Args:
        kernel: a `triton.jit` function whose constexpr arguments are its last ones.
        arguments: tensors and ints, for all arguments before those.
        n_programs: size of the grid.
        options: constexpr arguments and options of the compiler.
    """
    return _run(kernel, *arguments, grid=(n_programs,), warmup=True, **options)


class Gpu:
    """The pretended GPU.

    Attributes:
        launched: how often each kernel was launched.
        seed: of the order in which warps run; each launch takes the next one.
    """

    def __init__(self) -> None:
        self.launched: dict[str, int] = {}
        self.seed = 0
        self._programs: dict[str, Program] = {}

    def launch(self, kernel: JITFunction[Any], arguments: Sequence[Any], n_programs: int, **options: Any) -> None:
        """Compile a kernel and execute it at once. The arguments are those of `compile_for`."""
        compiled = compile_for(kernel, arguments, n_programs, **options)
        ptx = compiled.asm["ptx"]
        program = self._programs.get(ptx) or self._programs.setdefault(ptx, parse(ptx))
        values = [
            a.data_ptr() if isinstance(a, torch.Tensor) else a
            for parameter, a in zip(kernel.params, arguments, strict=False)
            if not parameter.is_constexpr and (isinstance(a, torch.Tensor) or a != 1 or parameter.do_not_specialize)
        ]
        self.launched[kernel.fn.__name__] = self.launched.get(kernel.fn.__name__, 0) + 1
        self.seed += 1
        Machine(program, n_programs, values, Global(memory_of_tensors()), compiled.metadata.shared, self.seed).run()


@contextmanager
def pretended() -> Iterator[Gpu]:
    """A context in which the kernels of the package run on the pretended GPU. Triton's interpreter has to be off."""
    gpu = Gpu()

    def run(kernel: JITFunction[Any], *arguments: Any, grid: Sequence[int], warmup: bool, **options: Any) -> None:
        # As Triton's interpreter, it returns no compiled kernel that could be called directly.
        gpu.launch(kernel, arguments, grid[0], **options)

    driver.set_active(_Driver())  # there is no other one that could be put back
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "interpreting", lambda *_: True))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield gpu
