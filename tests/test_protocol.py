"""Everything an optimizer is expected to do besides its step: what torch, its tools and frameworks rely on."""

import copy
import inspect
import pickle

import pytest
import torch

from lwadamw import AdamW, param_groups

from .cases import assert_matches_reference, clone_params, make_params, make_reference, reference_step, set_grads

SHAPES = [(30,), (5, 7), (1030,), ()]


def _twins(backend, device, **options):
    ours, theirs = make_params(SHAPES, device), None
    theirs = clone_params(ours)
    return ours, theirs, AdamW(ours, backend=backend, **options), torch.optim.AdamW(theirs, foreach=False, **options)


def _assert_equal(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)


def test_arguments_are_torchs_in_torchs_order():
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (AdamW, torch.optim.AdamW))
    assert [(p.name, p.default) for p in ours[:6]] == [(p.name, p.default) for p in theirs[:6]]
    assert {p.name: p.default for p in theirs}.items() <= {p.name: p.default for p in ours}.items()
    assert [p.name for p in ours if p.name not in {q.name for q in theirs}] == ["max_grad_norm", "norms", "backend"]
    assert list(inspect.signature(AdamW.load_state_dict).parameters) == ["self", "state_dict"]
    assert issubclass(AdamW, torch.optim.AdamW)


def test_a_plain_optimizer_has_torchs_group_keys_only():
    params = make_params(SHAPES)
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
    params = make_params(SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    set_grads(params)
    optimizer.step()
    assert seen == ["pre", "post"]


def test_add_param_group_starts_its_own_steps(backend, device):
    ours, theirs, a, b = _twins(backend, device)
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
    _assert_equal([*ours, *late], [*theirs, *late_twin])
    assert float(a.state[late[0]]["step"]) == 2


def test_frozen_empty_and_gradless_groups(backend, device):
    ours, theirs, *_ = _twins(backend, device)
    frozen, twin = make_params([(4,)], device)[0].requires_grad_(False), None
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
    _assert_equal([*ours, frozen], [*theirs, twin])
    assert frozen in a.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, backend, device):
    ours, theirs, a, b = _twins(backend, device)
    for _ in range(3):
        set_grads(ours, theirs)
        a.step()
        b.step()
        a.zero_grad(set_to_none)
        b.zero_grad(set_to_none)
    a.step()
    b.step()
    _assert_equal(ours, theirs)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_continue_on_their_own(copier, backend, device):
    params = make_params(SHAPES, device)
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
    params = make_params(SHAPES, device)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=0.0, weight_decay=10.0, backend=backend)
    set_grads(params)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_backward_through_overwritten_weights_is_an_error(backend, device):
    p = torch.nn.Parameter(torch.randn(5, device=device))
    optimizer = AdamW([p], backend=backend)
    p.square().sum().backward()
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    params = make_params(SHAPES, device)
    expected = make_reference(params, {})
    optimizer = AdamW(params, backend=backend)
    for _ in range(3):
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
        # Whatever used to be there must not be written to any more.
        REPLACEMENTS[what](optimizer, params[2])
    set_grads(params)
    reference_step(expected, params, {})
    optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_moments_replaced_through_an_old_reference_are_noticed(backend, device):
    params = make_params(SHAPES, device)
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
    """As FSDP and accelerate do: placeholders at construction, the real parameters later."""
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1, device=device)) for _ in SHAPES], backend=backend)
    optimizer.load_state_dict(optimizer.state_dict())
    params = make_params(SHAPES, device)
    expected = make_reference(params, {})
    optimizer.param_groups[0]["params"][:] = params
    for _ in range(2):
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_a_parameter_exchanged_after_steps_starts_anew(backend, device):
    params = make_params(SHAPES, device)
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


def test_state_without_step_starts_at_zero(backend, device):
    """As Megatron creates it, before the first step and through load_state_dict."""
    params = make_params(SHAPES, device)
    expected = make_reference(params, {})
    optimizer = AdamW(params, backend=backend)
    for p in params:
        optimizer.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    optimizer.load_state_dict(optimizer.state_dict())
    set_grads(params)
    reference_step(expected, params, {})
    optimizer.step()
    assert_matches_reference(optimizer, params, expected)


def test_group_options_changed_between_steps_take_effect(backend, device):
    ours, theirs, a, b = _twins(backend, device)
    changes = [{}, {"lr": 0.1}, {"betas": (0.5, 0.6)}, {"eps": 1e-3}, {"weight_decay": 0.9}, {"maximize": True}]
    for change in changes:
        set_grads(ours, theirs)
        a.param_groups[0].update(change)
        b.param_groups[0].update(change)
        a.step()
        b.step()
        _assert_equal(ours, theirs)


def test_width_multipliers_added_between_steps_take_effect(backend, device):
    ours, theirs, a, b = _twins(backend, device, lr=1e-2)
    set_grads(ours, theirs)
    a.step()
    b.step()
    a.param_groups[0].update(width_lr_mult=0.5, width_wd_mult=1.0, width_eps_mult=1.0)
    b.param_groups[0]["lr"] = 5e-3
    set_grads(ours, theirs)
    a.step()
    b.step()
    _assert_equal(ours, theirs)


def test_a_width_multiplier_that_takes_the_place_of_another_key_takes_effect(backend, device):
    params = make_params(SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    optimizer.param_groups[0]["note"] = "as many keys before as after"
    set_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    del optimizer.param_groups[0]["note"]
    optimizer.param_groups[0]["width_lr_mult"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_copies_in_the_place_of_groups_are_followed(backend, device):
    ours, theirs, a, b = _twins(backend, device)
    for lr in (1e-3, 1e-1):
        a.param_groups = [dict(group, params=list(group["params"]), lr=lr) for group in a.param_groups]
        b.param_groups[0]["lr"] = lr
        set_grads(ours, theirs)
        a.step()
        b.step()
        _assert_equal(ours, theirs)
        a.param_groups = [dict(group, params=list(group["params"])) for group in a.param_groups]
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = lr / 2
        set_grads(ours, theirs)
        a.step()
        b.step()
        _assert_equal(ours, theirs)


def test_a_number_that_replaces_a_tensor_is_followed(backend, device):
    ours, theirs, a, b = _twins(backend, device)
    for value in (torch.tensor(1e-2, device=device), 1e-3, torch.tensor(3e-2, device=device), 2e-3):
        a.param_groups[0]["lr"] = value
        b.param_groups[0]["lr"] = float(value)
        set_grads(ours, theirs)
        a.step()
        b.step()
        _assert_equal(ours, theirs)


def test_amsgrad_switched_on_later_starts_its_maximum_then(device):
    params = make_params([(40,)], device)
    optimizer = AdamW(params, backend="triton")
    for amsgrad in (False, True):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        set_grads(params)
        optimizer.step()
    state = optimizer.state[params[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_unscales_and_skips(clip, fused, backend, device):
    """Over growth, a skipped step and backoff: the parameters of an unscaled run."""
    if backend == "torch" and not fused:
        pytest.skip("torch's other implementations leave unscaling to GradScaler")
    ours = make_params(SHAPES, device)
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
        _assert_equal(ours, theirs)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor_hyperparameters_are_read_at_every_step(dtype, backend, device):
    if backend == "torch" and dtype == torch.bfloat16:
        pytest.skip("torch computes 1 - lr*wd in bfloat16")
    ours, theirs, *_ = _twins(backend, device)
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
        _assert_equal(ours, theirs)


def test_parameters_moved_to_another_group_follow_it(backend, device):
    ours, theirs, mine, torchs = _twins(backend, device, lr=1e-2)
    for optimizer, params in ((mine, ours), (torchs, theirs)):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, device=device))], "lr": 0.1})
        params.append(optimizer.param_groups[1]["params"][0])
    for move in (None, (-1, 0), (0, 1)):  # the last to the front, then the first to the end: their order stays
        if move is not None:
            for optimizer in (mine, torchs):
                source, target = (group["params"] for group in optimizer.param_groups)
                target.insert(len(target) * move[1], source.pop(move[0]))
        set_grads(ours, theirs)
        mine.step()
        torchs.step()
        _assert_equal(ours, theirs)


def test_state_of_a_step_in_inference_mode_serves_outside_of_it(backend, device):
    ours, theirs, mine, torchs = _twins(backend, device)
    for inference in (True, False, True):
        set_grads(ours, theirs)
        with torch.inference_mode(inference):
            mine.step()
        torchs.step()
        _assert_equal(ours, theirs)
    assert not any(value.is_inference() for value in mine.state[ours[0]].values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_training_step_contains_the_optimizers(backend, device):
    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(device)
    twin = copy.deepcopy(model)
    ours, theirs = (AdamW(m.parameters(), lr=1e-2, backend=backend, max_grad_norm=0.1) for m in (model, twin))
    compiled = torch.compile(train, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(7, 6, device=device)
        torch.testing.assert_close(compiled(model, ours, x), train(twin, theirs, x))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_parameter_that_grew_under_its_state_is_refused(backend, device):
    """The kernels that trust sizes would write past the end of the moments."""
    p = torch.nn.Parameter(torch.ones(5, device=device))
    optimizer = AdamW([p], backend=backend)
    set_grads([p])
    optimizer.step()
    p.data, p.grad = torch.ones(5000, device=device), None
    set_grads([p])
    with pytest.raises(RuntimeError, match=r"exp_avg of '0.0' has shape \(5,\), the parameter \(5000,\)"):
        optimizer.step()


def test_capture_is_refused_where_it_would_go_wrong(backend, device, monkeypatch):
    params = make_params(SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    monkeypatch.setattr("lwadamw.engine.capturing", lambda: True)
    monkeypatch.setattr("lwadamw.plan.capturing", lambda: True)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="group 0 has capturable=False"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="Take one uncaptured step first"):
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p, b)


def test_capture_with_other_gradients_than_the_step_before_is_refused(device, monkeypatch):
    params = make_params(SHAPES, device)
    optimizer = AdamW(params, backend="triton", capturable=True)
    set_grads(params)
    optimizer.step()
    monkeypatch.setattr("lwadamw.engine.capturing", lambda: True)
    monkeypatch.setattr("lwadamw.plan.capturing", lambda: True)
    optimizer.step()
    params[0].grad = params[0].grad.clone()
    with pytest.raises(RuntimeError, match="gradients or hyperparameters changed"):
        optimizer.step()
