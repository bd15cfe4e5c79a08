"""Promise 1: every step equals that of torch.optim.AdamW within torch's tolerances, for all options that torch tests."""

import copy
import importlib.util
import sys
import types
import unittest

import pytest
import torch

import lwadamw
from tests.cases import make_params, set_grads

if importlib.util.find_spec("expecttest") is None:
    # torch's module imports it for a base class, and nothing here uses that. A bare GPU machine does not have it.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in
from torch.testing._internal.common_optimizers import optim_inputs_func_adamw

SHAPES = [(10, 5), (5,), (1,), (), (3, 100), (1030,), (0,)]


def _inputs():
    """Return torch's inputs for the CPU and for CUDA, without `capturable`, which torch refuses on CPU tensors.

    Many inputs for CUDA equal one for the CPU then. They are left out.
    """
    plain = {i.desc: i.kwargs for i in optim_inputs_func_adamw("cpu", torch.float32)}
    known = {_text(kwargs) for kwargs in plain.values()}
    for i in optim_inputs_func_adamw("cuda", torch.float32):
        kwargs = {k: v for k, v in i.kwargs.items() if k != "capturable"}
        if _text(kwargs) not in known:
            known.add(_text(kwargs))
            plain[f"{i.desc}, uncaptured"] = kwargs
    return plain


def _text(kwargs):
    return repr(sorted(kwargs.items()))


INPUTS = _inputs()


@pytest.mark.parametrize("desc", INPUTS)
def test_ten_steps_equal_torch(desc, backend, device):
    """All gradients are missing in step 2. A parameter is frozen in steps 4 and 5. State is compared after every step.

    After the comparison our values are set to torch's, so that a difference does not grow.
    """
    kwargs = copy.deepcopy(INPUTS[desc])
    ours = make_params(SHAPES, device)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = lwadamw.AdamW(ours, **kwargs, backend=backend)
    b = torch.optim.AdamW(theirs, **copy.deepcopy(kwargs), foreach=False)
    for step in range(10):
        set_grads(ours, theirs)
        if step == 2:
            for p in (*ours, *theirs):
                p.grad = None
        for frozen in (ours[4], theirs[4]):
            frozen.requires_grad_(not 4 <= step < 6)
            if 4 <= step < 6:
                frozen.grad = None
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)
            for key, value in b.state[q].items():
                current = a.state[p][key]
                torch.testing.assert_close(current.to(value.dtype), value, rtol=1.3e-6, atol=1e-5, check_device=False)
                with torch.no_grad():
                    current.copy_(value)
            with torch.no_grad():
                p.copy_(q)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"fused": True}, {}])
def test_torch_backend_has_torchs_bits_on_the_cpu_with_the_same_flags(flags):
    ours = make_params(SHAPES)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    # Without flags torch.optim.AdamW loops over operators on the CPU. Our torch backend takes torch's fused kernel.
    a, b = lwadamw.AdamW(ours, **flags), torch.optim.AdamW(theirs, **(flags or {"fused": True}))
    for _ in range(3):
        set_grads(ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_differentiable_step_lets_gradients_through():
    results = []
    for optimizer_class in (lwadamw.AdamW, torch.optim.AdamW):
        weight = torch.tensor([1.0, -2.0], requires_grad=True)
        p = weight.clone()
        scale = torch.tensor(3.0, requires_grad=True)
        optimizer = optimizer_class([p], lr=0.1, differentiable=True)
        p.grad = scale * torch.tensor([0.5, 0.25])
        optimizer.step()
        p.square().sum().backward()
        results.append((p.detach(), weight.grad, scale.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def _error(params, device, steps, run):
    """Return the distance (2-norm) of fp32 weights from those of a float64 run over the same gradients."""
    exact = [torch.nn.Parameter(p.detach().double()) for p in params]
    optimizer, reference = run(params), torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.1, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p, q in zip(params, exact, strict=True):
            grad = torch.randn(p.shape, generator=generator).to(device)
            p.grad, q.grad = grad, grad.double()
        optimizer.step()
        reference.step()
    return sum((p.double() - q).square().sum() for p, q in zip(params, exact, strict=True)).sqrt().item()


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_drift_no_further_from_float64_than_torch_fused(steps, device):
    start = make_params([(300,)], device)
    copies = [[torch.nn.Parameter(p.detach().clone()) for p in start] for _ in range(2)]
    ours = _error(copies[0], device, steps, lambda ps: lwadamw.AdamW(ps, lr=1e-3, weight_decay=0.1, backend="triton"))
    fused = _error(copies[1], device, steps, lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, fused=True))
    assert ours <= fused
