"""Parameters of two models that one optimizer trains may have the same names: checkpoints tell them apart by their places."""

import copy

import pytest
import torch

from lwadamw import AdamW
from tests.state.storages import assert_same_bits


def _two_models(shape, *, split, order=("w", "b", "w", "b")):
    """An optimizer of parameters that share their names, in one group or in one group per model, after a step."""
    pairs = [(name, torch.nn.Parameter(torch.randn(shape))) for name in order]
    groups = [{"params": pairs[:2]}, {"params": pairs[2:]}] if split else [{"params": pairs}]
    optimizer = AdamW(groups, lr=0.1, backend="torch")
    for _, p in pairs:
        p.grad = torch.randn(shape)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("split", [False, True])
def test_parameters_that_share_a_name_get_each_its_own_state(split):
    optimizer = _two_models((3, 5), split=split)
    twin = copy.deepcopy(optimizer)
    twin.state.clear()
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(isinstance(p, torch.Tensor) for p in twin.state)
    for a, b in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert optimizer.state[p].keys() == twin.state[q].keys()
            assert all(torch.equal(value, twin.state[q][key]) for key, value in optimizer.state[p].items())


def test_a_name_that_several_parameters_share_is_refused_in_another_order_and_the_remedy_works():
    optimizer = _two_models((4,), split=False)
    other = _two_models((4,), split=False, order=("w", "w", "b", "b"))
    state_dict, before = optimizer.state_dict(), copy.deepcopy(other)
    with pytest.raises(ValueError, match="several parameters of the checkpoint are called 'w'") as refused:
        other.load_state_dict(state_dict)
    assert_same_bits(other, before)
    exec(str(refused.value).splitlines()[-1].strip(), {"state_dict": state_dict})
    other.load_state_dict(state_dict)
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_a_parameter_that_stands_twice_in_a_group_is_no_second_parameter_of_its_name():
    optimizer = _two_models((4,), split=False, order=("a", "b"))
    twin = _two_models((4,), split=False, order=("b", "a"))
    group = optimizer.param_groups[0]
    group["params"], group["param_names"] = group["params"] * 2, group["param_names"] * 2
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(group["params"][:2], twin.param_groups[0]["params"][::-1], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], twin.state[q]["exp_avg"])
