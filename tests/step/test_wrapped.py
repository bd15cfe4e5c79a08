"""An object that wraps the optimizer, by copying its `__dict__` or by passing attributes on, sees what the optimizer does."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lwadamw import AdamW, Monitor


class Proxy:
    """Wraps as Lightning does: the class derives from the optimizer's, and missing attributes are passed on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Proxy" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Copy(Proxy):
    """Wraps as Fabric did: the `__dict__` of the optimizer is copied."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = dict(optimizer.__dict__)
        super().__init__(optimizer)


def trained(wrapper: type[Proxy] | None, **options: Any) -> tuple[AdamW, Any, nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = AdamW(model.named_parameters(), lr=0.1, **options)
    wrapped: Any = optimizer if wrapper is None else wrapper(optimizer)
    step(model, wrapped)
    return optimizer, wrapped, model


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("wrapper", [Proxy, Copy])
def test_a_wrapper_reads_and_sets_what_the_optimizer_has(wrapper, backend):
    optimizer, wrapped, model = trained(wrapper, backend=backend)
    assert isinstance(wrapped, AdamW)
    assert wrapped.state is optimizer.state
    assert wrapped.norms().as_dict() == optimizer.norms().as_dict()
    wrapped.max_grad_norm = 0.5
    assert optimizer.max_grad_norm == wrapped.max_grad_norm == 0.5
    step(model, wrapped)
    assert wrapped.grad_norm is optimizer.grad_norm
    assert float(wrapped.grad_norm) > 0.5
    assert wrapped.norms().grad == pytest.approx(optimizer.norms().grad)
    assert float((wrapped.norms().grad ** 2).sum()) == pytest.approx(0.25)
    assert wrapped.steps_taken() == 2
    assert int(wrapped.skipped_steps) == 0


@pytest.mark.parametrize("wrapper", [Proxy, Copy])
def test_a_checkpoint_loaded_through_a_wrapper_is_loaded_into_the_optimizer(wrapper, backend):
    former, _, _ = trained(None, backend=backend)
    saved = former.state_dict()
    optimizer, wrapped, model = trained(wrapper, backend=backend)
    step(model, wrapped)
    wrapped.load_state_dict(saved)
    assert optimizer.steps_taken() == wrapped.steps_taken() == 1
    step(model, wrapped)
    assert optimizer.steps_taken() == wrapped.steps_taken() == 2
    assert wrapped.norms().as_dict() == optimizer.norms().as_dict()


@pytest.mark.parametrize("wrapper", [Proxy, Copy])
def test_a_monitor_of_a_wrapper_is_one_of_the_optimizer(wrapper):
    _, wrapped, model = trained(wrapper)
    monitor = Monitor(wrapped, every=1)
    assert monitor.step == 1
    step(model, wrapped)
    assert monitor.step == 2
    assert monitor.latest.columns["weight_rms"].shape == (2,)


def test_a_monitor_finds_the_optimizer_behind_an_attribute():
    class Behind(torch.optim.Optimizer):
        """Wraps as accelerate does."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer, _, model = trained(None)
    monitor = Monitor(Behind(optimizer), every=1)
    assert monitor.optimizer is optimizer
    step(model, optimizer)
    assert monitor.step == 2


def test_whoever_says_that_scaling_is_not_left_to_the_step_is_heard():
    optimizer = AdamW([nn.Parameter(torch.ones(4))], fused=True)
    assert optimizer._step_supports_amp_scaling
    Proxy(optimizer)._step_supports_amp_scaling = False
    assert not optimizer._step_supports_amp_scaling


def test_an_optimizer_that_is_dropped_is_freed_at_once():
    optimizer, _, _ = trained(None)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_the_hooks_of_a_subclass_whose_step_calls_its_parents_run_once():
    class Mine(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    AdamW([nn.Parameter(torch.ones(1))])  # torch wraps the step of a class when its first optimizer is made
    p = nn.Parameter(torch.ones(3))
    optimizer, calls = Mine([p], weight_decay=0.1), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    monitor = Monitor(optimizer, every=1, spectrum_every=0)
    for _ in range(3):
        p.grad = torch.randn(3)
        optimizer.step()
    assert calls == ["before", "after"] * 3
    assert [reading.step for reading in monitor.readings] == [1, 2, 3]


def test_hooks_run_again_after_a_step_that_failed():
    p = nn.Parameter(torch.ones(3))
    optimizer, calls = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    p.grad = torch.ones(3)
    optimizer.step()
    assert calls == ["before"] * 2
