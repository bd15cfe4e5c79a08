"""A warning names the line of the user, whatever torch and this package put in between."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from lwadamw import AdamW, param_groups


def _model():
    return nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))


def _old(model):
    old = torch.optim.AdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    old.step()
    old.zero_grad()
    return old.state_dict()


def loads_a_checkpoint_without_a_rule(model):
    AdamW(param_groups(model, 16)).load_state_dict(_old(model))


def loads_moments_of_another_dtype(model):
    AdamW(model.parameters(), exp_avg_dtype=torch.bfloat16).load_state_dict(_old(model))


def misspells_a_key_of_a_group(model):
    AdamW([{"params": list(model.parameters()), "width_lr_mul": 2.0}])


def misspells_a_key_of_an_added_group(model):
    optimizer = AdamW(model[0].parameters())
    optimizer.add_param_group({"params": list(model[1].parameters()), "width_lr_mul": 2.0})


def steps_without_gradients(model):
    optimizer = AdamW(model.parameters())
    for _ in range(5):
        optimizer.step()


def steps_without_gradients_under_a_scheduler(model):
    optimizer = AdamW(model.parameters())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    for _ in range(5):
        optimizer.step()


def names_a_role_of_no_parameter(model):
    param_groups(model, 16, roles={"2.weight": "output"}, strict=False)


WARNED = [
    loads_a_checkpoint_without_a_rule,
    loads_moments_of_another_dtype,
    misspells_a_key_of_a_group,
    misspells_a_key_of_an_added_group,
    steps_without_gradients,
    steps_without_gradients_under_a_scheduler,
    names_a_role_of_no_parameter,
]


@pytest.mark.parametrize("code", WARNED)
def test_a_warning_names_the_users_line(code):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code(_model())
    lines, first = inspect.getsourcelines(code)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert first < caught[0].lineno < first + len(lines)
