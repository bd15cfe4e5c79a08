"""Gradient release: what others change between two backward passes is followed, and step() takes what no hook has taken."""

import copy

import pytest
import torch

from lwadamw import AdamW
from tests.step.releases import Pair, backward, model_of_two_layers

pytestmark = pytest.mark.matrix


def _reset_state(_, optimizer):
    p = optimizer.param_groups[0]["params"][1]
    del optimizer.state[p]


def _replace_moment(_, optimizer):
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p]["exp_avg"] = torch.full_like(optimizer.state[p]["exp_avg"], 0.5)


def _replace_moment_data(_, optimizer):
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p]["exp_avg"].data = torch.full_like(p, 0.5).detach()


def _edit_moment(_, optimizer):
    for state in optimizer.state.values():
        state["exp_avg_sq"].mul_(4)


def _replace_step(_, optimizer):
    p = optimizer.param_groups[0]["params"][2]
    optimizer.state[p]["step"] = torch.tensor(100.0)


def _replace_state_dict_of_one(_, optimizer):
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p] = {key: value.clone() * 2 for key, value in optimizer.state[p].items()}


def _replace_whole_state(_, optimizer):
    old, new = optimizer.state, type(optimizer.state)(dict)
    for p, state in old.items():
        new[p] = {key: value.clone() * 2 for key, value in state.items()}
    optimizer.state = new


def _load(_, optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] *= 3
    optimizer.load_state_dict(saved)


def _convert(_, optimizer):
    for group in optimizer.param_groups:
        group["exp_avg_dtype"] = torch.bfloat16
    optimizer.convert_state()


def _assign_hyperparameters(_, optimizer):
    optimizer.param_groups[0].update(lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2)


def _turn_amsgrad_on(_, optimizer):
    optimizer.param_groups[0]["amsgrad"] = True


def _replace_data(model, _):
    for p in model.parameters():
        p.data = p.data.clone() * 2


def _transpose_data(model, _):
    p = model[0].weight
    p.data = p.data.t().contiguous().t()


def _double_data(model, optimizer):
    for p in model.parameters():
        p.data = p.data.double()
    optimizer.state.clear()


def _shrink_in_place(model, optimizer):
    """The first rows of the last layer stay, at the same address."""
    layer = model[1]
    layer.weight.data, layer.bias.data = layer.weight.data[:2], layer.bias.data[:2]
    for p in (layer.weight, layer.bias):
        del optimizer.state[p]


def _move_to_new_group(_, optimizer):
    p = optimizer.param_groups[0]["params"].pop(0)
    optimizer.add_param_group({"params": [p], "lr": 0.5})


def _replace_group_dict(_, optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}


def _id(change):
    return change.__name__.strip("_")


CHANGES = [
    _reset_state,
    _replace_moment,
    _replace_moment_data,
    _edit_moment,
    _replace_step,
    _replace_state_dict_of_one,
    _replace_whole_state,
    _load,
    _convert,
    _assign_hyperparameters,
    _turn_amsgrad_on,
    _replace_data,
    _transpose_data,
    _double_data,
    _shrink_in_place,
    _move_to_new_group,
    _replace_group_dict,
]


@pytest.mark.parametrize("call_step", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=_id)
def test_a_change_between_two_backward_passes_is_followed(change, call_step, backend, device):
    if change is _double_data and backend == "triton":
        backend = None
    pair = Pair(backend, device)
    pair.train(2, call_step)
    pair.both(change)
    pair.train(2, call_step)
    pair.check()


def _write_weight(model, _):
    with torch.no_grad():
        model[0].weight.mul_(2)


STORAGE = [
    {"master_weights": torch.float32},
    {"master_weights": "remainder"},
    {"rounding": "kahan"},
    {"rounding": "stochastic", "exp_avg_dtype": torch.float32},
]


@pytest.mark.parametrize("options", STORAGE, ids=str)
@pytest.mark.parametrize("change", [_reset_state, _replace_data, _write_weight, _load, _convert], ids=_id)
def test_a_change_is_followed_in_16_bit_storage(change, options, backend, device):
    pair = Pair(backend, device, torch.bfloat16, **options)
    pair.train(2)
    pair.both(change)
    pair.train(2)
    pair.check()


def test_an_edited_list_of_betas_is_followed(backend, device):
    pair = Pair(backend, device)
    pair.both(lambda _, optimizer: optimizer.param_groups[0].update(betas=[0.9, 0.99]))
    pair.train(2)
    pair.optimizers[0].param_groups[0]["betas"][0] = 0.3
    pair.optimizers[1].param_groups[0]["betas"] = (0.3, 0.99)
    pair.train(2)
    pair.check()


def test_a_parameter_that_turns_float64_is_refused_by_name_with_backend_triton(device):
    pair = Pair("triton", device)
    pair.train()
    _double_data(pair.models[0], pair.optimizers[0])
    before = [p.detach().clone() for p in pair.models[0].parameters()]
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot update .* its dtype is torch.float64"):
        backward(pair.models[0], 5)
    assert all(map(torch.equal, pair.models[0].parameters(), before))


def test_state_that_stopped_fitting_is_refused_by_name(backend, device):
    """A parameter that shrinks at its address would be updated past its end."""
    pair = Pair(backend, device)
    pair.train()
    model = pair.models[0]
    rest = model[1].weight.data[2:]
    before = rest.clone()
    model[1].weight.data, model[1].bias.data = model[1].weight.data[:2], model[1].bias.data[:2]
    with pytest.raises(RuntimeError, match=r"exp_avg of '0\.\d' has shape"):
        backward(model, 5)
    assert torch.equal(rest, before)


@pytest.mark.parametrize("call_step", [True, False])
def test_unfrozen_parameters_take_their_steps(call_step, backend, device):
    pair = Pair(backend, device)
    pair.both(lambda model, _: model[0].requires_grad_(False))
    pair.handle.remove()
    pair.handle = pair.optimizers[0].release_gradients()
    pair.train(1, call_step)
    assert not pair.optimizers[0].state.get(pair.models[0][0].weight)
    pair.both(lambda model, _: model[0].requires_grad_(True))
    pair.train(2, call_step)
    pair.check()


def test_a_parameter_that_was_unfrozen_steps_within_backward_from_the_second_time_on(backend, device):
    model = model_of_two_layers(device)
    model[1].bias.requires_grad_(False)
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    backward(model, 1)
    model[1].bias.requires_grad_(True)
    backward(model, 2)
    optimizer.step()
    assert float(optimizer.state[model[1].bias]["step"]) == 1
    backward(model, 3)
    assert model[1].bias.grad is None
    assert float(optimizer.state[model[1].bias]["step"]) == 2


def test_a_frozen_parameter_keeps_its_value_and_its_step(backend, device):
    pair = Pair(backend, device)
    pair.train()
    pair.both(lambda model, _: model[0].requires_grad_(False))
    pair.train(2)
    pair.check()
    assert float(pair.optimizers[0].state[pair.models[0][0].weight]["step"]) == 1


@pytest.mark.parametrize("how", ["add_param_group", "append"])
def test_parameters_added_later_take_their_steps(how, backend, device):
    pair = Pair(backend, device)
    late = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    for model, p in zip(pair.models, late, strict=True):
        model.register_parameter("late", p)
        model.register_forward_hook(lambda module, _, out: out * module.late)
    pair.train()
    for p in late:
        p.grad = None
    for optimizer, p in zip(pair.optimizers, late, strict=True):
        if how == "append":
            optimizer.param_groups[0]["params"].append(p)
        else:
            optimizer.add_param_group({"params": [p]})
    pair.train(2)
    pair.check()
    assert float(pair.optimizers[0].state[late[0]]["step"]) == 2


def test_a_parameter_that_left_the_groups_is_not_touched(backend, device):
    model = model_of_two_layers(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    backward(model, 1)
    p = optimizer.param_groups[0]["params"].pop(0)
    before = p.detach().clone()
    backward(model, 2)
    assert torch.equal(p, before)
    assert p.grad is not None
    first = p.grad.clone()
    optimizer.step()
    assert torch.equal(p.grad, first)
    assert not p._post_accumulate_grad_hooks
    optimizer.param_groups[0]["params"].append(p)
    backward(model, 3)
    optimizer.step()
    assert p.grad is None
    assert not torch.equal(p, before)


def test_a_parameter_object_that_was_replaced_is_followed(backend, device):
    pair = Pair(backend, device)
    pair.train()

    def change(model, optimizer):
        new = torch.nn.Parameter(model[0].weight.detach() * 2)
        optimizer.param_groups[0]["params"][0] = model[0].weight = new
        optimizer.state.clear()

    pair.both(change)
    pair.train(2)
    pair.check()


def test_step_takes_gradients_that_were_assigned(backend, device):
    """A framework that shards parameters assigns gradients after backward, so no hook fires."""
    pair = Pair(backend, device)
    for step in range(3):
        for model in pair.models:
            torch.manual_seed(step)
            for i, p in enumerate(model.parameters()):
                p.grad = None if i == step else torch.randn_like(p)
        pair.optimizers[0].step()
        pair.optimizers[1].step()
        pair.optimizers[1].zero_grad()
        pair.check()
        ours, theirs = (optimizer.norms() for optimizer in pair.optimizers)
        assert ours.names == theirs.names
        assert ours.update == pytest.approx(theirs.update, rel=1e-6)


def test_norms_where_some_parameters_step_in_backward_and_some_in_step(backend, device):
    pair = Pair(backend, device)
    pair.train()
    for model in pair.models:
        model[1].requires_grad_(False)
        backward(model, 7)
        for p in model[1].parameters():
            p.grad = torch.ones_like(p)
    for optimizer in pair.optimizers:
        optimizer.step()
    ours, theirs = (optimizer.norms() for optimizer in pair.optimizers)
    assert ours.names == theirs.names
    for column in ("weight", "update", "grad", "angle"):
        assert getattr(ours, column) == pytest.approx(getattr(theirs, column), rel=1e-6)
    pair.optimizers[1].zero_grad()
    pair.check()


def test_a_sparse_gradient_is_refused_before_any_parameter_is_updated(backend, device):
    pair = Pair(backend, device)
    model, optimizer = pair.models[0], pair.optimizers[0]
    pair.train()
    model[1].requires_grad_(False)
    backward(model, 2)
    before = [p.detach().clone() for p in model.parameters()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].weight.grad = torch.ones_like(model[1].weight).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_a_sparse_gradient_is_refused_in_backward(backend, device):
    table = torch.nn.Embedding(5, 3, sparse=True, device=device)
    optimizer = AdamW(table.parameters(), backend=backend)
    optimizer.release_gradients()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        table(torch.tensor([1, 2], device=device)).sum().backward()
    assert torch.equal(table.weight, before)


def test_a_group_whose_gradients_are_elsewhere_is_refused(backend, device):
    model = model_of_two_layers(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    optimizer.release_gradients()
    late = torch.nn.Parameter(torch.zeros(3, device=device))
    with pytest.raises(RuntimeError, match="group 1 has grad_attribute='main_grad'"):
        optimizer.add_param_group({"params": [late], "grad_attribute": "main_grad"})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["grad_attribute"] = "main_grad"
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="group 0 has grad_attribute='main_grad'"):
        backward(model, 1)
    assert all(map(torch.equal, model.parameters(), before))
