"""Gradient release: the same steps inside backward, few gradients alive at a time, and no new tables."""

import pytest
import torch

from lwadamw import AdamW, param_groups
from lwadamw.tables.triton_backend import TritonBackend
from tests.state.storages import assert_same_bits


def _model(device, dtype=torch.float32, depth=2):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, 24, device=device, dtype=dtype) for _ in range(depth)]
    return torch.nn.Sequential(*(m for layer in layers for m in (layer, torch.nn.Tanh())))


def _train(model, optimizer, device, steps=3, released=True):
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(8, 24, device=device, dtype=dtype)).square().sum().backward()
        optimizer.step()
        if not released:
            optimizer.zero_grad()


STORAGE = [
    {},
    {"amsgrad": True},
    {"master_weights": "remainder", "dtype": torch.bfloat16},
    {"rounding": "stochastic", "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", STORAGE)
def test_released_steps_equal_whole_steps_bit_for_bit(options, backend, device):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    one, two = _model(device, dtype), _model(device, dtype)
    ours, theirs = (AdamW(m.named_parameters(), lr=1e-2, backend=backend, **options) for m in (one, two))
    ours.release_gradients()
    _train(one, ours, device)
    _train(two, theirs, device, released=False)
    assert_same_bits(ours, theirs)
    assert ours.steps_taken() == theirs.steps_taken() == 3
    assert all(p.grad is None for p in one.parameters())


def test_schedules_and_groups_are_followed(backend, device):
    one, two = _model(device), _model(device)
    sets = []
    for model in (one, two):
        optimizer = AdamW(param_groups(model, base_width=6, width=24, rule="kosson2025"), lr=1e-2, backend=backend)
        sets.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    sets[0][0].release_gradients()
    for _ in range(3):
        for model, (optimizer, schedule) in zip((one, two), sets, strict=True):
            _train(model, optimizer, device, steps=1, released=model is one)
            schedule.step()
    assert_same_bits(sets[0][0], sets[1][0])
    assert sets[0][0].steps_taken() == 3


def test_few_gradients_are_alive_at_a_time(backend, device):
    model = _model(device, depth=6)
    optimizer = AdamW(model.parameters(), backend=backend)
    alive = []
    original = optimizer._step_released
    optimizer._step_released = lambda p: (
        alive.append(sum(q.grad is not None for q in model.parameters())),
        original(p),
    )
    optimizer.release_gradients()
    _train(model, optimizer, device, 2)
    assert len(alive) == 2 * 12
    assert max(alive) <= 2
    assert {float(s["step"]) for s in optimizer.state.values()} == {2}


def test_released_steps_use_the_tables_of_the_whole_step(device, monkeypatch):
    made = []
    original = TritonBackend.__init__
    monkeypatch.setattr(TritonBackend, "__init__", lambda self, *a, **k: (made.append(1), original(self, *a, **k))[1])
    model = _model(device)
    optimizer = AdamW(model.parameters(), backend="triton")
    optimizer.release_gradients()
    _train(model, optimizer, device)
    assert len(made) == 1
    (device_plan,) = optimizer._engine._triton._plans
    plan, whole = device_plan.plan, device_plan.plan._launches
    for launches in whole._row_launches.values():
        for launch in launches:
            tables = [t for t in launch._arguments if isinstance(t, torch.Tensor)]
            assert {t.data_ptr() for t in tables} <= {
                t.data_ptr() for t in (*whole._coefficients[0]._arguments, *whole._update[0]._arguments)
                if isinstance(t, torch.Tensor)
            } | {plan._tables.uncounted.data_ptr()}  # fmt: skip


def test_norms_of_released_steps_equal_those_of_whole_steps(backend, device):
    one, two = _model(device), _model(device)
    ours, theirs = (AdamW(m.named_parameters(), lr=1e-2, backend=backend) for m in (one, two))
    ours.release_gradients()
    _train(one, ours, device, 2)
    _train(two, theirs, device, 1, released=False)
    torch.manual_seed(1)
    two(torch.randn(8, 24, device=device)).square().sum().backward()
    theirs.step()
    released, whole = ours.norms(), theirs.norms()
    assert released.names == whole.names
    for column in ("weight", "update", "grad", "angle"):
        assert getattr(released, column) == pytest.approx(getattr(whole, column), rel=1e-6)


def test_removing_the_handle_ends_gradient_release(backend, device):
    model = _model(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    with optimizer.release_gradients():
        _train(model, optimizer, device, 1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 24, device=device)).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    assert {float(s["step"]) for s in optimizer.state.values()} == {2}


def test_norms_after_removing_the_handle_describe_the_last_step(backend, device):
    one, two = _model(device), _model(device)
    ours, theirs = (AdamW(m.named_parameters(), lr=1e-2, backend=backend) for m in (one, two))
    with ours.release_gradients():
        _train(one, ours, device, 1)
    _train(two, theirs, device, 1, released=False)
    for model, optimizer in ((one, ours), (two, theirs)):
        torch.manual_seed(1)
        model(torch.randn(8, 24, device=device)).square().sum().backward()
        optimizer.step()
    assert_same_bits(ours, theirs)
    for column in ("weight", "update", "grad", "angle"):
        assert getattr(ours.norms(), column) == pytest.approx(getattr(theirs.norms(), column), rel=1e-6)


def test_options_that_need_all_gradients_at_once_are_refused(device):
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    with pytest.raises(RuntimeError, match="max_grad_norm=1.0: the global norm is known only when all"):
        AdamW([p], max_grad_norm=1.0).release_gradients()
    with pytest.raises(RuntimeError, match="grad_attribute='main_grad', which autograd does not write"):
        AdamW([p], grad_attribute="main_grad").release_gradients()
    optimizer = AdamW([p])
    optimizer.release_gradients()
    with pytest.raises(RuntimeError, match="released already"):
        optimizer.release_gradients()
    with pytest.raises(RuntimeError, match="max_grad_norm=1.0 while gradients are released"):
        optimizer.max_grad_norm = 1.0


def test_parameters_added_later_are_released_too(backend, device):
    model, late = _model(device), torch.nn.Parameter(torch.ones(24, device=device))
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    optimizer.add_param_group({"params": [late]})
    (model(torch.randn(8, 24, device=device)) * late).sum().backward()
    assert late.grad is None
    assert float(optimizer.state[late]["step"]) == 1
