"""Promise 1: for every option torch tests its own AdamW with, each step is torch.optim.AdamW's within torch's tolerances."""

import copy

import pytest
import torch

import lwadamw
from tests.cases import make_params, set_grads

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
from torch.testing._internal.common_optimizers import optim_inputs_func_adamw

SHAPES = [(10, 5), (5,), (1,), (), (3, 400), (1030,), (0,)]


def _inputs():
    """torch's inputs for the CPU, and those for CUDA without `capturable`, which torch refuses on CPU tensors."""
    plain = {i.desc: i.kwargs for i in optim_inputs_func_adamw("cpu", torch.float32)}
    for i in optim_inputs_func_adamw("cuda", torch.float32):
        kwargs = {k: v for k, v in i.kwargs.items() if k != "capturable"}
        plain.setdefault(f"{i.desc}, uncaptured", kwargs)
    return plain


INPUTS = _inputs()


@pytest.mark.parametrize("desc", INPUTS)
def test_twenty_steps_equal_torch(desc, backend, device):
    """Missing gradients at step 2, a frozen parameter from 8 to 12; compared and resynchronised after every step."""
    kwargs = copy.deepcopy(INPUTS[desc])
    ours = make_params(SHAPES, device)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = lwadamw.AdamW(ours, **kwargs, backend=backend)
    b = torch.optim.AdamW(theirs, **copy.deepcopy(kwargs), foreach=False)
    for step in range(20):
        set_grads(ours, theirs)
        if step == 2:
            for p in (*ours, *theirs):
                p.grad = None
        for frozen in (ours[4], theirs[4]):
            frozen.requires_grad_(not 8 <= step < 12)
            if 8 <= step < 12:
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
def test_flags_are_torchs_own_bits_on_the_cpu(flags):
    ours = make_params(SHAPES)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    # Not asked for anything, torch loops over operators here, and this takes torch's fused kernel.
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


def _error(params, device, run):
    """Root mean square distance of fp32 weights from a float64 run over the same gradients."""
    exact = [torch.nn.Parameter(p.detach().double()) for p in params]
    optimizer, reference = run(params), torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.1, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        for p, q in zip(params, exact, strict=True):
            grad = torch.randn(p.shape, generator=generator).to(device)
            p.grad, q.grad = grad, grad.double()
        optimizer.step()
        reference.step()
    return sum((p.double() - q).square().sum() for p, q in zip(params, exact, strict=True)).sqrt().item()


def test_thousand_steps_drift_no_further_from_float64_than_torch_fused(device):
    start = make_params([(300,)], device)
    copies = [[torch.nn.Parameter(p.detach().clone()) for p in start] for _ in range(2)]
    ours = _error(copies[0], device, lambda ps: lwadamw.AdamW(ps, lr=1e-3, weight_decay=0.1, backend="triton"))
    fused = _error(copies[1], device, lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, fused=True))
    assert ours <= fused
