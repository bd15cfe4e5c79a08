"""Promise 6: bad input is refused with its name, its shape, the broken rule and a remedy, before anything is written."""

import math

import pytest
import torch

from lwadamw import AdamW, Rule, Scale
from lwadamw.step import backends
from lwadamw.width.rules import get_rule
from tests.cases import make_params, set_grads


def _p(*shape, **kwargs):
    return torch.nn.Parameter(torch.randn(*shape, **kwargs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.5)}, "Invalid beta parameter at index 0"),
        ({"eps": -1.0}, "Invalid epsilon"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0.0 is not positive.*None for no clipping"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan is not positive"),
        ({"backend": "cuda"}, "backend='cuda' is not one of None, 'triton', 'torch'"),
        ({"backend": "triton", "foreach": True}, "backend='triton' excludes foreach=True"),
        ({"backend": "triton", "fused": False}, "backend='triton' excludes fused=False"),
        ({"backend": "triton", "differentiable": True}, "backend='triton' excludes differentiable=True"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([_p(3)], **options)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, "1"])
def test_bad_width_multiplier_is_refused_and_its_group_not_added(value):
    optimizer = AdamW([_p(3)])
    with pytest.raises(ValueError, match="group 1: width_lr_mult=.* is not a finite number >= 0"):
        optimizer.add_param_group({"params": [_p(4)], "width_lr_mult": value})
    assert len(optimizer.param_groups) == 1


def test_a_group_of_adam_is_refused_only_if_it_has_weight_decay(backend, device):
    adam = torch.optim.Adam([_p(3, device=device)], weight_decay=0.1)
    adam.param_groups[0]["decoupled_weight_decay"] = False  # torch 2.6 did not say so
    with pytest.raises(ValueError, match="group 0: decoupled_weight_decay=False with weight_decay=0.1 asks for Adam"):
        AdamW([dict(adam.param_groups[0])], backend=backend)
    p = _p(3, device=device)
    optimizer = AdamW([{"params": [p], "weight_decay": 0.0, "decoupled_weight_decay": False}], backend=backend)
    p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.load_state_dict(adam.state_dict())
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match="asks for Adam"):
        optimizer.step()
    assert torch.equal(p, before)


def test_bad_segments_are_refused():
    with pytest.raises(ValueError, match=r"segments \(2, 3\) of 'w' \(4, 5\) are not positive row counts"):
        AdamW([{"params": [("w", _p(4, 5))], "segments": {"w": (2, 3)}}])
    with pytest.raises(ValueError, match="segments for 'v', which is not a parameter of this group. .* called 'w'"):
        AdamW([{"params": [("w", _p(4, 5))], "segments": {"v": (2, 2)}}])


REFUSED = {
    "dtype": (lambda: _p(3, 4).double(), r"dtype is torch.float64.*backend='torch'"),
    "gaps": (lambda: torch.randn(3, 8)[:, ::2], r"strides \(8, 2\) leave gaps or overlap"),
    "complex": (lambda: torch.randn(3, 4, dtype=torch.complex64), "dtype is torch.complex64"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_parameter_that_triton_cannot_update_is_named(what, device):
    make, message = REFUSED[what]
    good, bad = _p(5).to(device), torch.nn.Parameter(make().to(device))
    before = good.detach().clone()
    optimizer = AdamW([("good", good), ("bad", bad)], backend="triton")
    set_grads([good, bad])
    with pytest.raises(RuntimeError, match=rf"cannot update 'bad' \(3, 4\): its {message}"):
        optimizer.step()
    assert torch.equal(good, before)
    assert not optimizer.state


def test_sparse_gradients_are_refused_before_anything_is_written(backend, device):
    good, sparse = _p(5).to(device), torch.nn.Embedding(10, 3, sparse=True).to(device)
    optimizer = AdamW([("good", good), ("table", sparse.weight)], backend=backend)
    before = good.detach().clone()
    good.grad = torch.ones_like(good)
    sparse(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients: the gradient of 'table' \(10, 3\).*sparse=False"):
        optimizer.step()
    assert torch.equal(good, before)


def test_state_that_does_not_fit_is_refused(backend, device):
    params = make_params([(5,), (6,)], device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(7, device=device)
    set_grads(params)
    with pytest.raises(RuntimeError, match=r"exp_avg of '0.1' has shape \(7,\), the parameter \(6,\)"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_state_on_another_device_is_refused(backend, device):
    params = make_params([(5,)], device)
    optimizer = AdamW(params, backend=backend)
    optimizer.state[params[0]].update(exp_avg=torch.zeros(5, device="meta"), exp_avg_sq=torch.zeros(5, device="meta"))
    set_grads(params)
    with pytest.raises(RuntimeError, match="exp_avg of '0.0' .* is on meta.*Move the optimizer state back"):
        optimizer.step()


def test_the_error_for_a_cpu_parameter_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    p = _p(3)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="it is on the CPU.*TRITON_INTERPRET=1"):
        AdamW([p], backend="triton").step()


def test_without_triton_the_torch_backend_takes_the_step(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    p = _p(3)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        AdamW([p], backend="triton").step()
    before = p.detach().clone()
    AdamW([p]).step()
    assert not torch.equal(p, before)


def test_the_error_for_an_unknown_rule_lists_the_known_rules():
    with pytest.raises(
        ValueError, match=r"unknown rule 'fan'\. .*Rules are standard, mup, fan2025, kosson2025, balanced"
    ):
        get_rule("fan")
    with pytest.raises(TypeError, match=r"rule must be a name or a lwadamw.Rule, got int"):
        get_rule(3)
    with pytest.raises(ValueError, match="exponent lr=nan is not finite"):
        Rule("mine", matrix=Scale(lr=math.nan))
    with pytest.raises(ValueError, match="width ratio m=0 is not a positive number"):
        Scale().at(0)


def test_a_misspelt_key_of_a_group_is_warned_of_and_other_keys_are_not():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="nobody reads the key") as found:
        AdamW([{"params": [p], "weight_deacy": 0.0, "width_lr_mul": 3.0, "lr_mult": 2.0, "wd_mult": 1.0, "name": "a"}])
    assert [
        str(warning.message).removeprefix("lwadamw.AdamW: group 0: nobody reads the key ") for warning in found
    ] == [
        "'weight_deacy'. Closest: 'weight_decay'.",
        "'width_lr_mul'. Closest: 'width_lr_mult'.",
    ]
