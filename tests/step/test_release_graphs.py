"""Gradient release on unusual graphs: checkpointed layers, shared parameters, several backward passes, chosen inputs."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lwadamw import AdamW
from lwadamw.step.nested_backward import in_nested_backward
from tests.cases import assert_equal


class _Net(torch.nn.Module):
    """Layers of which the first one runs three times, each time checkpointed."""

    def __init__(self, device, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (torch.nn.Linear(5, 5, device=device) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for _ in range(3):
            if self.reentrant is None:
                x = torch.tanh(self.first(x))
            else:
                x = torch.tanh(checkpoint(self.first, x, use_reentrant=self.reentrant))
        return self.last(x)


def _loss(model, seed):
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    return model(torch.randn(3, 5, device=device, requires_grad=True)).square().sum()


def test_checkpointed_layers_take_one_step_in_each_backward(backend, device):
    one, two = _Net(device, False), _Net(device, None)
    ours, theirs = AdamW(one.parameters(), lr=1e-2, backend=backend), torch.optim.AdamW(two.parameters(), lr=1e-2)
    ours.release_gradients()
    for step in range(3):
        _loss(one, step).backward()
        _loss(two, step).backward()
        theirs.step()
        theirs.zero_grad()
    assert {float(s["step"]) for s in ours.state.values()} == {3}
    assert_equal(list(one.parameters()), list(two.parameters()))


def test_reentrant_checkpointing_is_refused_before_the_layer_is_updated(backend, device):
    model = _Net(device, True)
    optimizer = AdamW(model.named_parameters(), backend=backend)
    handle = optimizer.release_gradients()
    before = [p.detach().clone() for p in model.first.parameters()]
    with pytest.raises(
        RuntimeError, match=r"'first\.\w+' \(5.*\) runs inside another backward.*\s*.*use_reentrant=False"
    ):
        _loss(model, 0).backward()
    assert all(map(torch.equal, model.first.parameters(), before))
    handle.remove()
    model.zero_grad()
    _loss(model, 0).backward()
    optimizer.step()
    assert not any(map(torch.equal, model.first.parameters(), before))


def test_a_backward_inside_a_function_of_the_user_is_refused(backend, device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamW([p], backend=backend)
    optimizer.release_gradients()

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                (p * 2).sum().backward()
            return grad

    with pytest.raises(RuntimeError, match="runs inside another backward"):
        Inner.apply(torch.ones(4, device=device, requires_grad=True)).sum().backward()
    assert torch.equal(p, torch.ones_like(p))


def test_nested_backward_is_told_from_a_plain_one(device):
    seen = []
    x = torch.ones(3, requires_grad=True, device=device)
    x.register_post_accumulate_grad_hook(lambda _: seen.append(in_nested_backward()))
    x.sum().backward()
    thread = threading.Thread(target=lambda: x.sum().backward())
    thread.start()
    thread.join()
    torch.autograd.backward([x.sum(), (x * 2).sum()])
    checkpoint(lambda y: (y * x).sum(), torch.ones(3, requires_grad=True, device=device), use_reentrant=True).backward()
    assert seen == [False, False, False, True]
    assert not in_nested_backward()


def test_a_parameter_that_several_modules_share_takes_one_step(backend, device):
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        one, two = torch.nn.Linear(5, 5, device=device), torch.nn.Linear(5, 5, device=device)
        two.weight = one.weight
        models.append(torch.nn.Sequential(one, torch.nn.Tanh(), two))
    ours = AdamW(models[0].parameters(), lr=1e-2, backend=backend)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2)
    ours.release_gradients()
    for step in range(3):
        for model in models:
            _loss(model, step).backward()
        theirs.step()
        theirs.zero_grad()
    assert_equal(list(models[0].parameters()), list(models[1].parameters()))
    assert float(ours.state[models[0][0].weight]["step"]) == 3


def test_two_backward_passes_through_one_graph_are_two_steps(backend, device):
    p, q = (torch.nn.Parameter(torch.ones(4, device=device)) for _ in range(2))
    ours, theirs = AdamW([p], lr=1e-2, backend=backend), torch.optim.AdamW([q], lr=1e-2)
    ours.release_gradients()
    loss = (p * 3).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        q.grad = torch.full_like(q, 3.0)
        theirs.step()
    assert_equal([p], [q])


def test_a_second_backward_through_weights_that_have_moved_is_an_error(backend, device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamW([p], backend=backend)
    optimizer.release_gradients()
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    after = p.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert torch.equal(p, after)


def test_only_the_inputs_of_a_backward_take_their_steps(backend, device):
    model = torch.nn.Linear(5, 5, device=device)
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    bias = model.bias.detach().clone()
    _loss(model, 0).backward(inputs=[model.weight])
    assert torch.equal(model.bias, bias)
    assert model.weight.grad is None
    assert float(optimizer.state[model.weight]["step"]) == 1
    torch.autograd.grad(_loss(model, 1), list(model.parameters()))
    assert float(optimizer.state[model.weight]["step"]) == 1


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_backward_with_create_graph_steps_like_any_other(backend, device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    optimizer = AdamW([p], backend=backend, betas=(0.0, 0.0))
    optimizer.release_gradients()
    (p * 3).sum().backward(create_graph=True)
    assert float(optimizer.state[p]["exp_avg"][0]) == 3
    assert not optimizer.state[p]["exp_avg"].requires_grad
    assert p.grad is None


def test_threads_that_run_backward_at_the_same_time(backend, device):
    """Every parameter takes every step, whichever thread takes it."""
    params = [torch.nn.Parameter(torch.ones(40, device=device)) for _ in range(4)]
    optimizer = AdamW(params, backend=backend)
    optimizer.release_gradients()
    errors = []

    def train(p):
        try:
            for _ in range(5):
                (p * 2).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(p,)) for p in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {float(s["step"]) for s in optimizer.state.values()} == {5}


@pytest.mark.parametrize("derived", [False, True], ids=["of torch's class", "of a subclass"])
def test_gradients_that_are_averaged_later_are_refused(derived, backend, device, tmp_path, monkeypatch):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 3, device=device)
        parallel = torch.nn.parallel.DistributedDataParallel
        wrapped = (type("Derived", (parallel,), {}) if derived else parallel)(model)
        optimizer = AdamW(model.named_parameters(), backend=backend)
        optimizer.release_gradients().remove()  # one process has nothing to average
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        with pytest.raises(RuntimeError, match=r"DistributedDataParallel averages the gradient of 'weight' \(3, 3\)"):
            optimizer.release_gradients()
        wrapped(torch.ones(2, 3, device=device)).sum().backward()
        assert model.weight.grad is not None
        optimizer.step()
        assert optimizer.steps_taken() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_flat_parameter_is_refused(backend, device):
    p = torch.nn.Parameter(torch.ones(4, device=device))
    p._is_flat_param = True
    optimizer = AdamW([("flat", p)], backend=backend)
    with pytest.raises(RuntimeError, match=r"FullyShardedDataParallel averages the gradient of 'flat' \(4,\)"):
        optimizer.release_gradients()
