"""Tensors whose elements are not the numbers in their memory: lazy negatives and conjugates, and tensors without memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from lwadamw import AdamW
from tests.cases import assert_equal, clone_params, make_params

SHAPES = ((6, 5), (3,))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("lazy", [torch._neg_view, torch.Tensor.clone])
def test_a_negated_gradient_counts_with_its_sign(lazy, max_grad_norm, backend, device):
    ours = make_params(SHAPES, device)
    theirs = clone_params(ours)
    a, b = AdamW(ours, lr=0.1, backend=backend, max_grad_norm=max_grad_norm), torch.optim.AdamW(theirs, lr=0.1)
    memory = [torch.empty_like(p) for p in ours]
    for step in range(4):
        for p, q, held in zip(ours, theirs, memory, strict=True):
            held.normal_()  # always at the same address, so that only the sign tells one step from another
            p.grad = held if step % 2 == 0 else lazy(held)
            q.grad = p.grad.resolve_neg().clone()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        a.step()
        b.step()
        assert_equal(ours, theirs)


def test_the_gradient_that_autograd_negates_by_itself_is_taken(backend, device):
    def train(make):
        torch.manual_seed(0)
        real, imaginary = (nn.Parameter(torch.randn(1, device=device)) for _ in range(2))
        optimizer = make([real, imaginary])
        for _ in range(3):
            optimizer.zero_grad()
            (torch.complex(real, imaginary).conj() * (2 + 3j)).real.sum().backward()
            assert imaginary.grad.is_neg()
            optimizer.step()
        return [real, imaginary]

    ours = train(lambda params: AdamW(params, lr=0.1, backend=backend))
    assert_equal(ours, train(lambda params: torch.optim.AdamW(params, lr=0.1)))


def test_a_negated_parameter_is_updated_with_its_sign_or_refused(backend, device):
    theirs = nn.Parameter(torch.randn(5, device=device))
    ours = nn.Parameter(theirs.detach().clone())
    a, b = AdamW([ours], lr=0.1, backend=backend), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(2):
        if step:
            ours.data = torch._neg_view(ours.data.neg_())  # the same values at the same address
        ours.grad = torch.randn_like(theirs)
        theirs.grad = ours.grad.clone()
        if step and backend == "triton":
            before = ours.detach().clone()
            with pytest.raises(RuntimeError, match=r"cannot update '0.0' \(5,\): it is a negated view"):
                a.step()
            assert torch.equal(ours, before)
            return
        a.step()
        b.step()
    assert_equal([ours], [theirs])


def test_a_zero_tensor_as_a_gradient_decays_the_weight(device):
    ours = nn.Parameter(torch.randn(4, device=device))
    theirs = nn.Parameter(ours.detach().clone())
    a, b = AdamW([ours], lr=0.1, backend="triton"), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(3):
        grad = torch.randn(4, device=device) if step == 0 else torch._efficientzerotensor(4, device=device)
        ours.grad, theirs.grad = grad, grad.clone()
        a.step()
        b.step()
        assert_equal([ours], [theirs])


def test_kernels_refuse_a_parameter_without_memory_of_its_own_and_torch_updates_it(backend, device):
    parts = make_params(((4, 4), (4, 4)), device)
    ours = nn.Parameter(TwoTensor(*(p.detach().clone() for p in parts)))
    a, b = AdamW([ours], lr=0.1, backend=backend), torch.optim.AdamW(parts, lr=0.1)
    for p in parts:
        p.grad = torch.randn_like(p)
    ours.grad = TwoTensor(*(p.grad.clone() for p in parts))
    if backend == "triton":
        with pytest.raises(RuntimeError, match=r"'0.0' \(4, 4\): it is a TwoTensor without memory of its own"):
            a.step()
        return
    a.step()
    b.step()
    assert_equal([ours.data.a, ours.data.b], parts)


def test_a_gradient_whose_memory_was_freed_is_refused_by_the_kernels(device):
    p = nn.Parameter(torch.randn(4, device=device))
    optimizer = AdamW([p], backend="triton")
    p.grad = torch.randn(4, device=device)
    optimizer.step()
    before = p.detach().clone()
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"memory of the gradient of '0.0' \(4,\) in p.grad has been freed"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"max_grad_norm": 0.5}, {"amsgrad": True}])
def test_a_conjugate_that_autograd_leaves_is_taken(options):
    def train(make, resolve):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        optimizer = make([p])
        for _ in range(3):
            optimizer.zero_grad()
            (p.conj() * torch.arange(5)).imag.sum().backward()
            assert p.grad.is_conj()
            if resolve:
                p.grad = p.grad.resolve_conj()
            before = p.detach().clone()
            if resolve and "max_grad_norm" in options:
                torch.nn.utils.clip_grad_norm_([p], options["max_grad_norm"])
            optimizer.step()
        return p, before, optimizer

    ours, before, a = train(lambda params: AdamW(params, lr=0.1, **options), False)
    plain = {key: value for key, value in options.items() if key != "max_grad_norm"}
    theirs, _, b = train(lambda params: torch.optim.AdamW(params, lr=0.1, **plain), True)
    torch.testing.assert_close(ours, theirs)
    norms = a.norms()
    found = (norms.grad[0], norms.update[0])
    expected = (torch.linalg.vector_norm(theirs.grad), torch.linalg.vector_norm(ours.detach() - before))
    assert found == pytest.approx(tuple(map(float, expected)), rel=1e-4)
    assert b.state[theirs]["step"] == a.state[ours]["step"] == 3


def test_a_conjugate_parameter_is_refused_before_another_parameter_has_moved():
    plain, lazy = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64).conj())
    plain.grad, lazy.grad = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"'0.1' \(2,\) is a lazy conjugate"):
        AdamW([plain, lazy]).step()
    assert torch.equal(plain, torch.ones(2))
