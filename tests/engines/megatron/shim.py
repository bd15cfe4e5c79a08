"""Shim: real megatron-core on CPU tensors over gloo. No file of Megatron is changed.

Megatron asks for CUDA devices, compares the names of CUDA types, and calls functions of torch.cuda. The shim sends all of
this to the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.interpreter import quicken


class _OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a CUDA device are made on the CPU, and call themselves CUDA tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return out.replace("torch.", "torch.cuda.")
        return out


class _Stream:
    device, cuda_stream = torch.device("cpu"), 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> _Event:
        return self

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


_mode: _OnCpu | None = None


def install() -> None:
    """Install the shim in this process, and import Megatron. A second call does nothing."""
    global _mode
    if _mode is not None:
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quicken()
    _mode = _OnCpu()
    _mode.__enter__()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    stream = _Stream()
    cuda.current_stream = cuda.default_stream = lambda *_, **__: stream
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda _: contextlib.nullcontext()

    # Megatron's modules ask for Transformer Engine when they are imported. They must not find a stand-in.
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model  # noqa: F401
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    gc.freeze()  # Megatron collects garbage whenever it saves


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """While this context is active, torch's functions do not pass through the shim. Megatron itself does not run here."""
    assert _mode is not None
    _mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _mode.__enter__()


@contextlib.contextmanager
def transformer_engine(optimizer_class: type) -> Any:
    """Pretend that Transformer Engine is installed, as far as Megatron's choice of an optimizer asks for it.

    Args:
        optimizer_class: what stands in for its FusedAdam.
    """
    import megatron.core.optimizer as choice
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer_config as config

    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers")
    package = types.ModuleType(names[2])
    package.FusedAdam = optimizer_class  # type: ignore[attr-defined]
    values = [
        *((module, "is_te_min_version", lambda *_, **__: True) for module in (choice, config)),
        (choice, "Adam", optimizer_class),
        (choice, "USING_PYTORCH_OPTIMIZER", False),
        (distributed, "Adam", optimizer_class),
        (distributed, "HAVE_APEX_OR_TE", True),
        (distributed, "USING_TE_OPTIMIZER", True),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    try:
        for module, name, value in values:
            setattr(module, name, value)
        sys.modules.update(zip(names, (types.ModuleType(names[0]), types.ModuleType(names[1]), package), strict=True))
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for name in names:
            sys.modules.pop(name, None)
