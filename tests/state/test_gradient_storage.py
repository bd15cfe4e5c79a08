"""Gradients and parameters that others write: gradients of another attribute or dtype, and parameters with a master weight."""

import pytest
import torch

from lwadamw import AdamW
from tests.cases import assert_same_arithmetic
from tests.state.storages import SHAPES, B, F, H


@pytest.mark.parametrize("attribute", ["main_grad", "decoupled_grad"])
@pytest.mark.parametrize("dtype", [F, B, H])
def test_gradients_are_taken_from_where_a_framework_puts_them(attribute, dtype, backend, device):
    ours = [torch.nn.Parameter(torch.randn(s, device=device).to(B)) for s in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().float()) for p in ours]
    optimizer = AdamW(ours, backend=backend, master_weights="remainder", grad_attribute=attribute, max_grad_norm=1.0)
    twin = AdamW(theirs, backend=backend, max_grad_norm=1.0)
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            grad = torch.randn(p.shape, device=device).to(dtype)
            missing = step == 1 and i == 0
            setattr(p, attribute, None if missing else grad)
            q.grad = None if missing else grad.float()
        optimizer.step()
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizer.master_weight(p), q.detach(), rtol=1e-6, atol=1e-7)
    optimizer.zero_grad()
    kept = [getattr(p, attribute) is not None for p in ours]
    assert kept == [attribute == "main_grad"] * len(ours)


def test_gradients_may_change_their_dtype_between_steps(backend, device):
    p = torch.nn.Parameter(torch.randn(5000, device=device).to(B))
    q = torch.nn.Parameter(p.detach().float())
    ours = AdamW([p], backend=backend, master_weights=F, grad_attribute="main_grad")
    twin = AdamW([q], backend=backend)
    for dtype in (F, B, F, torch.float64):
        grad = torch.randn(5000, device=device).to(B)
        p.main_grad, q.grad = grad.to(dtype), grad.float()
        ours.step()
        twin.step()
        assert_same_arithmetic(ours.master_weight(p), q.detach(), backend)


def test_a_master_weight_follows_who_else_writes_to_its_parameter(backend, device):
    """And keeps its digits where the parameter is what it was: averaged weights swapped in and out."""
    p = torch.nn.Parameter(torch.randn(300, device=device).to(B))
    optimizer = AdamW([p], backend=backend, master_weights=F, lr=1e-3)
    p.grad = torch.randn_like(p)
    optimizer.step()
    master, kept = optimizer.master_weight(p), p.detach().clone()
    with torch.no_grad():
        p.zero_()
        p.copy_(kept)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.master_weight(p), master)
    with torch.no_grad():
        p[:100] = 7
    optimizer.step()
    assert torch.equal(p[:100], torch.full_like(p[:100], 7))
    assert torch.equal(optimizer.master_weight(p)[100:], master[100:])


def test_a_master_weight_follows_across_a_new_plan(backend, device):
    p, late = (torch.nn.Parameter(torch.randn(300, device=device).to(B)) for _ in range(2))
    optimizer = AdamW([p], backend=backend, master_weights=F, lr=1e-3)
    p.grad, late.grad = torch.randn_like(p), torch.randn_like(late)
    optimizer.step()
    with torch.no_grad():
        p.fill_(7)
    optimizer.add_param_group({"params": [late]})
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 7))
