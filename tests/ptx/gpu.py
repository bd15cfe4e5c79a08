"""Launches on the pretended GPU: Triton compiles the kernels, and machine.py executes the PTX.

Tensors stay on the CPU. Kernels see their memory and nothing else.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lwadamw.step import backends
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.program import parse

_run = JITFunction.run


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return divmod(self._capability, 10)


class Tensors:
    """The CPU tensors that exist. They are looked for among all objects only if a kernel gets one that is new."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[torch.Tensor]] = []

    def spans(self) -> list[tuple[int, int]]:
        """(address, bytes) of the known tensors and of their gradients."""
        out = []
        for tensor in (known() for known in self._known):
            if tensor is None:
                continue
            for t in (tensor, tensor.grad if tensor.is_leaf else None):
                if t is not None and t.device.type == "cpu" and t.layout == torch.strided:
                    out.append((t.data_ptr(), t.untyped_storage().nbytes() - t.storage_offset() * t.itemsize))
        return out

    def all_spans(self) -> list[tuple[int, int]]:
        """The same of all tensors that exist."""
        found = (
            o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), FakeTensor)
        )
        self._known = [weakref.ref(tensor) for tensor in found]
        return self.spans()


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
        variants: (name, constexpr arguments) of the kernels that were launched.
        seed: of the order in which warps run; each launch takes the next one.
    """

    def __init__(self) -> None:
        self.variants: list[tuple[str, dict[str, Any]]] = []
        self.seed = 0
        self._tensors = Tensors()

    def launch(self, kernel: JITFunction[Any], arguments: Sequence[Any], n_programs: int, **options: Any) -> None:
        """Compile a kernel and execute it at once. The arguments are those of `compile_for`."""
        compiled = compile_for(kernel, arguments, n_programs, **options)
        values = [
            a.data_ptr() if isinstance(a, torch.Tensor) else a
            for parameter, a in zip(kernel.params, arguments, strict=False)
            if not parameter.is_constexpr and (isinstance(a, torch.Tensor) or a != 1 or parameter.do_not_specialize)
        ]
        constants = {p.name: options[p.name] for p in kernel.params if p.is_constexpr and p.name in options}
        if (kernel.fn.__name__, constants) not in self.variants:
            self.variants.append((kernel.fn.__name__, constants))
        self.seed += 1
        memory = Global(self._tensors.spans(), self._tensors.all_spans)
        Machine(parse(compiled.asm["ptx"]), n_programs, values, memory, compiled.metadata.shared, self.seed).run()


@contextmanager
def pretended(capability: int = 90) -> Iterator[Gpu]:
    """A context in which kernels run on a pretended GPU. Triton's interpreter has to be off.

    Args:
        capability: the compute capability that kernels are compiled for, without its dot.
    """
    gpu = Gpu()

    def run(kernel: JITFunction[Any], *arguments: Any, grid: Sequence[int], warmup: bool, **options: Any) -> None:
        # As Triton's interpreter, it returns no compiled kernel that could be called directly.
        gpu.launch(kernel, arguments, grid[0], **options)

    before = vars(driver).get("_active", vars(driver).get("active"))  # Triton 3.2 has no underscore
    driver.set_active(_Driver(capability))
    with ExitStack() as stack:
        stack.callback(driver.set_active, before)
        stack.enter_context(mock.patch.object(backends, "interpreting", return_value=True))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield gpu
