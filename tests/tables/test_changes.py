"""If a tensor or a value is replaced, moved or rewritten between two steps, the next step uses it or refuses it."""

import copy

import pytest
import torch

from lwadamw import AdamW
from tests.cases import (
    FEW_SHAPES,
    assert_equal,
    assert_matches_reference,
    make_params,
    make_reference,
    make_twins,
    reference_step,
    set_grads,
)

REPLACEMENTS = {
    "param data": lambda o, p: setattr(p, "data", p.data.clone()),
    "moment data": lambda o, p: setattr(o.state[p]["exp_avg"], "data", o.state[p]["exp_avg"].data.clone()),
    "moment": lambda o, p: o.state[p].update(exp_avg_sq=o.state[p]["exp_avg_sq"].clone()),
    "step": lambda o, p: o.state[p].update(step=o.state[p]["step"].clone()),
    "state of a parameter": lambda o, p: o.state.update({p: {k: v.clone() for k, v in o.state[p].items()}}),
    "all state": lambda o, p: setattr(o, "state", copy.copy(o.state)),
    "a load": lambda o, p: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "groups": lambda o, p: setattr(o, "param_groups", [dict(g, params=list(g["params"])) for g in o.param_groups]),
}


@pytest.mark.parametrize("what", REPLACEMENTS)
def test_a_tensor_replaced_from_outside_is_noticed(what, backend, device):
    params = make_params(FEW_SHAPES, device)
    expected = make_reference(params, {})
    optimizer = AdamW(params, backend=backend)
    held = []
    for _ in range(2):
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
        # A step that still wrote to the old tensor would leave the new one behind. The old memory of the parameter is kept, so
        # that such a step fails the comparison below instead of writing to memory of something else.
        held.append(params[2].detach())
        REPLACEMENTS[what](optimizer, params[2])
    set_grads(params)
    reference_step(expected, params, {})
    optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_moments_replaced_through_an_old_reference_are_noticed(backend, device):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    optimizer.step()
    held = optimizer.state[params[0]]
    for _ in range(3):
        set_grads(params)
        optimizer.step()
    held["exp_avg"].data = torch.zeros_like(held["exp_avg"])
    set_grads(params)
    optimizer.step()
    torch.testing.assert_close(held["exp_avg"], 0.1 * params[0].grad)


def test_parameters_exchanged_in_their_group_are_noticed(backend, device):
    """FSDP and accelerate do so: the optimizer is made with placeholders and gets the real parameters later."""
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1, device=device)) for _ in FEW_SHAPES], backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())
    params = make_params(FEW_SHAPES, device)
    expected = make_reference(params, {})
    optimizer.param_groups[0]["params"][:] = params
    for _ in range(2):
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_a_parameter_exchanged_after_steps_starts_without_state(backend, device):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    for _ in range(2):
        set_grads(params)
        optimizer.step()
    old = params[1].detach().clone()
    new = make_params([(9,)], device)[0]
    expected = make_reference([new], {})
    optimizer.param_groups[0]["params"][1] = new
    set_grads([new])
    reference_step(expected, [new], {})
    optimizer.step()
    assert_matches_reference(optimizer, [new], expected)
    assert torch.equal(params[1], old)


def test_group_options_changed_between_steps_take_effect(backend, device):
    ours, theirs, a, b = make_twins(backend, device)
    changes = [{}, {"lr": 0.1}, {"betas": (0.5, 0.6)}, {"eps": 1e-3}, {"weight_decay": 0.9}, {"maximize": True}]
    for change in changes:
        set_grads(ours, theirs)
        a.param_groups[0].update(change)
        b.param_groups[0].update(change)
        a.step()
        b.step()
        assert_equal(ours, theirs)


def test_width_multipliers_added_between_steps_take_effect(backend, device):
    ours, theirs, a, b = make_twins(backend, device, lr=1e-2)
    set_grads(ours, theirs)
    a.step()
    b.step()
    a.param_groups[0].update(width_lr_mult=0.5, width_wd_mult=1.0, width_eps_mult=1.0)
    b.param_groups[0]["lr"] = 5e-3
    set_grads(ours, theirs)
    a.step()
    b.step()
    assert_equal(ours, theirs)


def test_a_width_multiplier_that_takes_the_place_of_another_key_takes_effect(backend, device):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    optimizer.param_groups[0]["note"] = "replaced by another key, so that the number of keys stays the same"
    set_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    del optimizer.param_groups[0]["note"]
    optimizer.param_groups[0]["width_lr_mult"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_copies_that_replace_the_groups_are_followed(backend, device):
    ours, theirs, a, b = make_twins(backend, device)
    for lr in (1e-3, 1e-1):
        a.param_groups = [dict(group, params=list(group["params"]), lr=lr) for group in a.param_groups]
        b.param_groups[0]["lr"] = lr
        set_grads(ours, theirs)
        a.step()
        b.step()
        assert_equal(ours, theirs)
        a.param_groups = [dict(group, params=list(group["params"])) for group in a.param_groups]
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = lr / 2
        set_grads(ours, theirs)
        a.step()
        b.step()
        assert_equal(ours, theirs)


def test_a_number_that_replaces_a_tensor_is_followed(backend, device):
    ours, theirs, a, b = make_twins(backend, device)
    for value in (torch.tensor(1e-2, device=device), 1e-3, torch.tensor(3e-2, device=device), 2e-3):
        a.param_groups[0]["lr"] = value
        b.param_groups[0]["lr"] = float(value)
        set_grads(ours, theirs)
        a.step()
        b.step()
        assert_equal(ours, theirs)


def test_amsgrad_that_is_switched_on_later_starts_its_maximum_at_that_step(device):
    params = make_params([(40,)], device)
    optimizer = AdamW(params, backend="triton")
    for amsgrad in (False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        set_grads(params)
        optimizer.step()
    state = optimizer.state[params[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor_hyperparameters_are_read_at_every_step(dtype, backend, device):
    if backend == "torch" and dtype == torch.bfloat16:
        pytest.skip("torch computes 1 - lr*wd in bfloat16")
    ours, theirs, *_ = make_twins(backend, device)
    lr = torch.tensor(1e-2, dtype=dtype, device=device)
    betas = (torch.tensor(0.5, device=device), torch.tensor(0.75, device=device))
    a = AdamW(ours, lr=lr, betas=betas, backend=backend)
    b = torch.optim.AdamW(theirs, lr=float(lr), betas=(0.5, 0.75), foreach=False)
    for value in (1e-2, 1e-3, 3e-2):
        lr.fill_(value)
        b.param_groups[0]["lr"] = float(lr)
        set_grads(ours, theirs)
        a.step()
        b.step()
        assert_equal(ours, theirs)


def test_parameters_moved_to_another_group_follow_it(backend, device):
    ours, theirs, mine, torchs = make_twins(backend, device, lr=1e-2)
    for optimizer, params in ((mine, ours), (torchs, theirs)):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, device=device))], "lr": 0.1})
        params.append(optimizer.param_groups[1]["params"][0])
    # From the first group, the last parameter moves to the front of the second group: the order of all parameters stays.
    # Then the first parameter moves to the end of the second group: the order changes.
    for move in (None, (-1, 0), (0, 1)):
        if move is not None:
            for optimizer in (mine, torchs):
                source, target = (group["params"] for group in optimizer.param_groups)
                target.insert(len(target) * move[1], source.pop(move[0]))
        set_grads(ours, theirs)
        mine.step()
        torchs.step()
        assert_equal(ours, theirs)


def test_a_parameter_that_grew_under_its_state_is_refused(backend, device):
    """The kernels trust the parameter's size. They would write past the end of the moments."""
    p = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = AdamW([p], backend=backend)
    set_grads([p])
    optimizer.step()
    p.data, p.grad = torch.ones(5000, device=device), None
    set_grads([p])
    with pytest.raises(RuntimeError, match=r"exp_avg of '0.0' has shape \(5,\), the parameter \(5000,\)"):
        optimizer.step()


@pytest.mark.parametrize("how", ["the group is edited", "the parameter is moved"])
def test_a_maximum_is_left_alone_while_the_group_has_no_amsgrad(how, backend, device):
    (p, q), twins = make_params([(70,), (3,)], device), make_params([(70,), (3,)], device)
    for mine, theirs in zip((p, q), twins, strict=True):
        theirs.data.copy_(mine.data)
    groups = [{"params": [p], "amsgrad": True}, {"params": [q]}]
    optimizer = AdamW(groups, lr=0.1, backend=backend)
    theirs = torch.optim.AdamW([{"params": [twins[0]], "amsgrad": True}, {"params": [twins[1]]}], lr=0.1)
    for step in range(3):
        if step == 1:
            for some in (optimizer.param_groups, theirs.param_groups):
                if how == "the group is edited":
                    some[0]["amsgrad"] = False
                else:
                    some[1]["params"].append(some[0]["params"].pop())
        set_grads((p, q), twins, scale=0.1 if step else 1.0)
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(p, twins[0], rtol=1.3e-6, atol=1e-5)
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][key], theirs.state[twins[0]][key], rtol=1.3e-6, atol=1e-5)
