"""FusedAdam without Megatron: arguments, the step count in the groups, and remainders in Transformer Engine's form."""

import copy

import pytest
import torch

import lwadamw
from lwadamw.engines.megatron import FusedAdam

from .stand_in import FusedAdam as StandIn

pytestmark = pytest.mark.matrix


def _take(optimizer, params, steps, attribute="grad"):
    """Take steps on gradients that depend on the number of the step alone."""
    for i in steps:
        for p in params:
            generator = torch.Generator().manual_seed(i * 7 + p.numel())
            setattr(
                p,
                attribute,
                torch.randn(p.shape, generator=generator).to(p.dtype if attribute == "grad" else torch.float32),
            )
        optimizer.step()


def _params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (65, 130)]


def _groups(params):
    return [{"params": [params[0]]}, {"params": []}, {"params": [params[1]], "weight_decay": 0.1}]


def test_every_group_has_the_count_of_steps_as_an_int_and_empty_groups_too():
    params = _params()
    optimizer = FusedAdam(_groups(params))
    assert all("step" not in group for group in optimizer.param_groups)
    _take(optimizer, params, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 3]
    assert all(type(group["step"]) is int for group in optimizer.param_groups)


@pytest.mark.parametrize("how", ["groups replaced", "loaded without step", "set_scaled_state"])
def test_the_count_in_the_groups_overrules_that_of_the_state(how, backend):
    params, twins = _params(), _params()
    whole, resumed = FusedAdam(_groups(params), backend=backend), FusedAdam(_groups(twins), backend=backend)
    _take(whole, params, range(4))
    saved = copy.deepcopy(whole.state_dict())
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            twin.copy_(p)
    if how == "set_scaled_state":
        for p, twin in zip(params, twins, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                resumed.set_scaled_state(twin, name, whole.get_unscaled_state(p, name))
        for group in resumed.param_groups:
            group["step"] = 4
    else:
        for state in saved["state"].values():
            del state["step"]
        if how == "groups replaced":
            steps = [group.pop("step") for group in saved["param_groups"]]
            resumed.load_state_dict(saved)
            resumed.param_groups = [{**g, "step": n} for g, n in zip(resumed.param_groups, steps, strict=True)]
        else:
            resumed.load_state_dict(saved)
    _take(whole, params, range(4, 7))
    _take(resumed, twins, range(4, 7))
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))
    assert {int(s["step"]) for s in resumed.state.values()} == {g["step"] for g in resumed.param_groups} == {7}


def test_a_checkpoint_of_torch_gives_the_groups_its_count():
    params, twins = _params(), _params()
    torchs, ours = torch.optim.AdamW(_groups(params), weight_decay=0.0), FusedAdam(_groups(twins))
    _take(torchs, params, range(5))
    ours.load_state_dict(torchs.state_dict())
    _take(ours, twins, range(5, 6))
    assert [group["step"] for group in ours.param_groups] == [6, 6, 6]


def test_a_step_that_fails_leaves_the_counts_in_the_groups():
    params = _params()
    optimizer = FusedAdam(_groups(params))
    _take(optimizer, params, range(2))
    params[0].grad = torch.zeros(65).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2, 2]
    _take(optimizer, params, range(1))
    assert {int(s["step"]) for s in optimizer.state.values()} == {g["step"] for g in optimizer.param_groups} == {3}


def test_moments_are_verified_as_soon_as_somebody_has_the_state(backend):
    params = _params()
    optimizer = FusedAdam(_groups(params), backend=backend)
    assert not optimizer.state  # as Megatron's wrappers look at it
    _take(optimizer, params, range(2))
    assert not optimizer._state_was_shared
    kept = FusedAdam(_groups(_params()), backend=backend)
    held = kept.state  # still empty, and it stays with us
    _take(kept, [p for g in kept.param_groups for p in g["params"]], range(2))
    for state in held.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])
    for one in (optimizer, kept):
        _take(one, [p for group in one.param_groups for p in group["params"]], range(2, 3))
        for p, state in one.state.items():
            torch.testing.assert_close(state["exp_avg"], 0.1 * p.grad)


@pytest.mark.parametrize("remainders", [True, False])
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_goes_to_a_stand_in_for_transformer_engine_and_back(ours_first, remainders):
    def make(cls, params):
        return cls(params, master_weights=True, use_decoupled_grad=True, store_param_remainders=remainders)

    params, twins = _params(torch.bfloat16), _params(torch.bfloat16)
    first, second = (FusedAdam, StandIn) if ours_first else (StandIn, FusedAdam)
    first, second = make(first, params), make(second, twins)
    _take(first, params, range(4), "decoupled_grad")
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            twin.copy_(p)
            for name in ("exp_avg", "exp_avg_sq", "master_param"):
                value = first.get_unscaled_state(p, name)
                assert value.dtype == (torch.int16 if remainders and name == "master_param" else torch.float32)
                second.set_scaled_state(twin, name, value)
    for group in second.param_groups:
        group["step"] = first.param_groups[0]["step"]
    _take(first, params, range(4, 8), "decoupled_grad")
    _take(second, twins, range(4, 8), "decoupled_grad")
    for p, twin in zip(params, twins, strict=True):
        assert (p - twin).abs().max() <= 2**-7 * p.abs().max()
        masters = [_master(o, q, remainders) for o, q in ((first, p), (second, twin))]
        torch.testing.assert_close(*masters, rtol=2e-6, atol=1e-7)


def _master(optimizer, p, remainders):
    value = optimizer.get_unscaled_state(p, "master_param")
    return ((p.detach().view(torch.int16).int() << 16) + value.int()).view(torch.float32) if remainders else value


def test_a_remainder_becomes_the_float32_master_weight_of_a_group_that_keeps_one():
    p = torch.nn.Parameter(torch.randn(40).bfloat16())
    master = p.detach().float() * (1 + 2**-10)
    remainder = master.view(torch.int32).to(torch.int16)
    with torch.no_grad():
        p.copy_(((master.view(torch.int32) - remainder.int()) >> 16).to(torch.int16).view(torch.bfloat16))
    optimizer = lwadamw.AdamW([p], master_weights=torch.float32)
    optimizer.set_scaled_state(p, "master_param", remainder)
    assert torch.equal(optimizer.master_weight(p), master)
    with pytest.raises(ValueError, match="Only the master weight of a bfloat16 parameter has a remainder"):
        optimizer.set_scaled_state(p, "exp_avg", remainder)


def test_remainders_that_went_through_a_float32_buffer_are_told_from_weights():
    params = _params(torch.bfloat16)
    optimizer = FusedAdam(params, master_weights=True, use_decoupled_grad=True, store_param_remainders=True)
    _take(optimizer, params, range(3), "decoupled_grad")
    for p in params:
        master, remainder = optimizer.master_weight(p), optimizer.get_unscaled_state(p, "master_param")
        assert not torch.equal(master, p.float())
        for values in (remainder, remainder.float(), master):
            optimizer.set_scaled_state(p, "master_param", torch.zeros_like(remainder))
            assert torch.equal(optimizer.master_weight(p), p.float())
            optimizer.set_scaled_state(p, "master_param", values)
            assert torch.equal(optimizer.master_weight(p), master)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adam_w_mode": False}, "Set decoupled_weight_decay=True"),
        ({"bias_correction": False}, "Leave it out"),
        ({"amsgrad": True}, "third moment"),
        ({"capturable": True}, "optimizer_cuda_graph=False"),
        ({"exp_avg_dtype": torch.uint8}, "exp_avg_dtype=torch.uint8.*fp8"),
        ({"exp_avg_sq_dtype": torch.float16}, "exp_avg_sq_dtype=torch.float16.*scale of their own"),
        ({"master_weights": True, "master_weight_dtype": torch.float16}, "main_params_dtype=torch.float32"),
        ({"max_grad_norm": 1.0}, "clip_grad=1.0"),
        ({"decay": "huber"}, "'independent'"),
    ],
)
def test_what_megatron_cannot_have_is_refused_with_a_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedAdam(_params(), **arguments)


def test_an_option_that_megatron_decides_is_refused():
    with pytest.raises(TypeError, match=r"rounding is not an option.*backend, decay, norms, peak_lr"):
        FusedAdam(_params(), rounding="kahan")


def test_the_peak_of_a_decay_law_is_the_max_lr_of_the_group():
    first, second = _params()
    groups = [{"params": [first], "max_lr": 0.5, "lr": 0.0}, {"params": [second], "max_lr": 0.25, "lr": 0.0}]
    assert [g["peak_lr"] for g in FusedAdam(groups, decay="independent").param_groups] == [0.5, 0.25]


def test_step_hooks_run_once():
    lwadamw.AdamW(_params()).step()
    params, calls = _params(), []
    optimizer = FusedAdam(params)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    _take(optimizer, params, range(2))
    assert calls == [1, 1]
