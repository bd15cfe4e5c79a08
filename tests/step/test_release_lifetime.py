"""Gradient release begins, ends and is copied as the handle and the optimizer say."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

from lwadamw import AdamW
from tests.cases import assert_equal
from tests.step.releases import Pair, backward, model_of_two_layers


def test_a_closure_is_evaluated_once_and_its_loss_is_returned(backend, device):
    pair = Pair(backend, device)
    losses = []

    def closure(model):
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(torch.randn(4, 6, device=device)).square().sum()
        loss.backward()
        losses.append(loss.detach())
        return loss

    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        assert optimizer.step(lambda model=model: closure(model)).detach() == losses[-1]
    pair.optimizers[1].zero_grad()
    assert len(losses) == 2
    pair.check()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "together"])
def test_a_copy_is_not_released(how, backend, device):
    model = model_of_two_layers(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    backward(model, 1)
    if how == "together":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "deepcopy":
        other = copy.deepcopy(optimizer)
        twin = None
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    params = other.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    originals = [p.detach().clone() for p in model.parameters()]
    if twin is None:
        for p in params:
            (p * 2).sum().backward()
    else:
        backward(twin, 2)
    assert all(map(torch.equal, params, before))
    other.step()
    assert not any(map(torch.equal, params, before))
    assert {float(other.state[p]["step"]) for p in params} == {2}
    assert all(p.grad is not None for p in params)
    assert all(map(torch.equal, model.parameters(), originals))
    other.release_gradients()


def test_a_deleted_optimizer_takes_no_more_steps(backend, device):
    model = model_of_two_layers(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    backward(model, 1)
    gone = weakref.ref(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    del optimizer
    gc.collect()
    assert gone() is None
    backward(model, 2)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is not None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_handle_keeps_its_optimizer(backend, device):
    model = model_of_two_layers(device)
    with AdamW(model.parameters(), backend=backend).release_gradients():
        gc.collect()
        backward(model, 1)
        assert all(p.grad is None for p in model.parameters())


def test_a_handle_may_be_removed_twice_and_leaves_a_later_one_alone(backend, device):
    model = model_of_two_layers(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    first = optimizer.release_gradients()
    first.remove()
    first.remove()
    optimizer.release_gradients()
    first.remove()
    backward(model, 1)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.release_gradients()


def test_an_exception_ends_the_context(backend, device):
    model = model_of_two_layers(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    with pytest.raises(ZeroDivisionError), optimizer.release_gradients():
        raise ZeroDivisionError
    backward(model, 1)
    assert all(p.grad is not None for p in model.parameters())


def test_two_optimizers_may_not_release_one_parameter(backend, device):
    model = model_of_two_layers(device)
    first, second = (AdamW(model.named_parameters(), backend=backend) for _ in range(2))
    handle = first.release_gradients()
    with pytest.raises(RuntimeError, match=r"another optimizer has released the gradient of '0.weight' \(5, 6\)"):
        second.release_gradients()
    handle.remove()
    second.release_gradients()
    backward(model, 1)
    assert second.steps_taken() == 1
    assert first.steps_taken() == 0


def test_the_weights_of_a_released_step_equal_those_of_torch(backend, device):
    model, twin = model_of_two_layers(device), model_of_two_layers(device)
    optimizer, theirs = (
        AdamW(model.parameters(), lr=1e-2, backend=backend),
        torch.optim.AdamW(twin.parameters(), lr=1e-2),
    )
    optimizer.release_gradients()
    for step in range(4):
        backward(model, step)
        backward(twin, step)
        theirs.step()
        theirs.zero_grad()
    assert_equal(list(model.parameters()), list(twin.parameters()))
