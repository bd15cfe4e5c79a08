"""What torch, its tools and frameworks expect of an optimizer besides the update."""

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lwadamw import AdamW, param_groups
from lwadamw.state import keys
from lwadamw.step.options import Options
from tests.cases import (
    FEW_SHAPES,
    assert_equal,
    assert_matches_reference,
    clone_params,
    make_params,
    make_reference,
    make_twins,
    reference_step,
    set_grads,
)


def test_arguments_begin_with_torchs_in_torchs_order():
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (AdamW, torch.optim.AdamW))
    assert [(p.name, p.default) for p in ours[:6]] == [(p.name, p.default) for p in theirs[:6]]
    assert {p.name: p.default for p in theirs}.items() <= {p.name: p.default for p in ours}.items()
    own = ["max_grad_norm", "nonfinite", "norms", "backend", "shard_group", *keys.named((*keys.STORAGE, *keys.LAW))]
    assert sorted(p.name for p in ours if p.name not in {q.name for q in theirs}) == sorted(own)
    assert list(inspect.signature(AdamW.load_state_dict).parameters) == ["self", "state_dict"]
    assert issubclass(AdamW, torch.optim.AdamW)


def test_groups_of_a_plain_optimizer_have_torchs_keys_only():
    params = make_params(FEW_SHAPES)
    assert AdamW(params).param_groups[0].keys() == torch.optim.AdamW(params).param_groups[0].keys()


def test_closure_runs_with_gradients_and_returns_its_loss(backend, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = AdamW([p], lr=0.1, backend=backend)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 3
    assert (p < 1).all()
    assert optimizer.step() is None


def test_hooks_run_once_and_in_order(backend, device):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    set_grads(params)
    optimizer.step()
    assert seen == ["pre", "post"]


def test_add_param_group_starts_its_own_steps(backend, device):
    ours, theirs, a, b = make_twins(backend, device)
    set_grads(ours, theirs)
    a.step()
    b.step()
    late = make_params([(6,)], device)
    late_twin = clone_params(late)
    a.add_param_group({"params": late, "lr": 0.1})
    b.add_param_group({"params": late_twin, "lr": 0.1})
    for _ in range(2):
        set_grads([*ours, *late], [*theirs, *late_twin])
        a.step()
        b.step()
    assert_equal([*ours, *late], [*theirs, *late_twin])
    assert float(a.state[late[0]]["step"]) == 2


def test_frozen_empty_and_gradless_groups(backend, device):
    ours, theirs, *_ = make_twins(backend, device)
    frozen = make_params([(4,)], device)[0].requires_grad_(False)
    twin = torch.nn.Parameter(frozen.detach().clone(), requires_grad=False)
    a = AdamW([{"params": ours}, {"params": []}, {"params": [frozen]}], backend=backend)
    b = torch.optim.AdamW([{"params": theirs}, {"params": []}, {"params": [twin]}], foreach=False)
    for step in range(3):
        set_grads(ours, theirs)
        if step == 1:
            a.zero_grad()
            b.zero_grad()
        if step == 2:
            frozen.requires_grad_(True)
            twin.requires_grad_(True)
            set_grads([frozen], [twin])
        a.step()
        b.step()
    assert_equal([*ours, frozen], [*theirs, twin])
    assert frozen in a.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, backend, device):
    ours, theirs, a, b = make_twins(backend, device)
    for _ in range(3):
        set_grads(ours, theirs)
        a.step()
        b.step()
        a.zero_grad(set_to_none)
        b.zero_grad(set_to_none)
    a.step()
    b.step()
    assert_equal(ours, theirs)


COPIERS = pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)


@COPIERS
def test_copies_keep_options_and_evidence(copier):
    groups = param_groups(torch.nn.Linear(8, 8), 2, width=8)
    optimizer = AdamW(groups, backend="torch", nonfinite="pass", norms=False, decay="independent", max_grad_norm=2.0)
    assert optimizer.evidence.keys() == {"weight", "bias"}
    twin = copier(optimizer)
    assert twin.options == optimizer.options == Options("torch", "pass", False, {"decay": "independent"})
    assert twin.evidence == optimizer.evidence
    assert twin.evidence is not optimizer.evidence
    assert twin.max_grad_norm == 2.0
    late = torch.nn.Parameter(torch.ones(3))
    twin.add_param_group({"params": [("late", late)]})
    assert twin.param_groups[-1]["decay"] == "independent"
    with pytest.raises(RuntimeError, match="norms=True"):
        twin.norms()


def test_an_optimizer_without_param_groups_has_default_options_and_no_evidence():
    optimizer = AdamW(make_params(FEW_SHAPES))
    assert optimizer.options == Options(backend=None, nonfinite="skip", norms=True, group={})
    assert optimizer.evidence == {}
    with pytest.raises(FrozenInstanceError):
        optimizer.options.norms = False


def test_steps_taken_is_the_largest_step_of_any_parameter(backend, device):
    """A parameter without a gradient and a skipped step do not count, nor does what others keep in the state."""
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend, max_grad_norm=1.0)
    optimizer.state["note"] = 7
    assert optimizer.steps_taken() == 0
    for bad in (False, False, True):
        set_grads(params)
        params[0].grad = None
        if bad:
            params[1].grad[0] = float("inf")
        optimizer.step()
    assert optimizer.steps_taken() == 2
    set_grads(params)
    optimizer.step()
    assert optimizer.steps_taken() == 3
    assert float(optimizer.state[params[0]]["step"]) == 1


@COPIERS
def test_copies_continue_on_their_own(copier, backend, device):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, lr=1e-2, max_grad_norm=0.5, backend=backend)
    set_grads(params)
    optimizer.step()
    twin = copier(optimizer)
    copied = twin.param_groups[0]["params"]
    assert twin.max_grad_norm == 0.5
    for _ in range(2):
        set_grads(params, copied)
        optimizer.step()
        twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copied, strict=True))
    assert torch.equal(optimizer.norm_sums(), twin.norm_sums())
    before = [p.detach().clone() for p in params]
    set_grads(copied)
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert float(optimizer.state[params[0]]["step"]) == 3


def test_lr_zero_moves_nothing(backend, device):
    params = make_params(FEW_SHAPES, device)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=0.0, weight_decay=10.0, backend=backend)
    set_grads(params)
    optimizer.step()
    assert optimizer.steps_taken() == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_backward_through_weights_that_a_step_has_overwritten_is_an_error(backend, device):
    p = torch.nn.Parameter(torch.randn(5, device=device))
    optimizer = AdamW([p], backend=backend)
    p.square().sum().backward()
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_without_step_starts_at_zero(backend, device):
    """Megatron creates state without `step` before the first step and passes it through load_state_dict."""
    params = make_params(FEW_SHAPES, device)
    expected = make_reference(params, {})
    optimizer = AdamW(params, backend=backend)
    for p in params:
        optimizer.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    optimizer.load_state_dict(optimizer.state_dict())
    set_grads(params)
    reference_step(expected, params, {})
    optimizer.step()
    assert_matches_reference(optimizer, params, expected)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_unscales_and_skips(clip, fused, backend, device):
    """Parameters equal those of a run without scaling, over growth of the scale, a skipped step and backoff."""
    if backend == "torch" and not fused:
        pytest.skip("torch's other implementations leave unscaling to GradScaler")
    ours = make_params(FEW_SHAPES, device)
    theirs = clone_params(ours)
    a = AdamW(ours, fused=fused, max_grad_norm=clip, backend=backend)
    b = torch.optim.AdamW(theirs, foreach=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2)
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * scaler.scale(torch.ones((), device=device))
        scaled = [p.grad.clone() for p in ours]
        if step == 2:
            ours[2].grad[5] = float("inf")
        scaler.step(a)
        scaler.update()
        if step != 2:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(theirs, clip)
            b.step()
            if backend == "triton":
                assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, scaled, strict=True))
        assert_equal(ours, theirs)
        assert float(a.state[ours[0]]["step"]) == float(b.state[theirs[0]]["step"])


def test_named_parameters_keep_their_names(backend, device):
    model = torch.nn.Linear(3, 4).to(device)
    optimizer = AdamW(model.named_parameters(), backend=backend)
    model(torch.ones(2, 3, device=device)).sum().backward()
    optimizer.step()
    assert optimizer.norms().names == ("weight", "bias")
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_params_is_the_first_key_of_every_group():
    groups = param_groups(torch.nn.Linear(8, 8), 8, width=8)
    assert all(next(iter(group)) == "params" for group in AdamW(groups).param_groups)


def test_effective_values_are_base_times_multiplier():
    groups = param_groups(torch.nn.Linear(64, 64), 16, width=64)
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.1)
    matrix, vector = optimizer.effective()
    assert (matrix["lr"], matrix["weight_decay"]) == (2.5e-3, 0.2)
    assert (vector["lr"], vector["weight_decay"]) == (1e-2, 0.0)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_profiler_sees_every_step_and_hooks_run_in_it(backend, device):
    model = torch.nn.Linear(3, 3, device=device)
    optimizer = AdamW(model.parameters(), backend=backend)
    seen = []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"]
    optimizer.step()
    assert len(seen) == 4
